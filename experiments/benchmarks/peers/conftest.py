"""Doctests skip the modules that import the peers, which need not be installed."""

collect_ignore = ["worker_processes.py", "torch_processes.py"]
collect_ignore_glob = ["*_rounds.py"]
