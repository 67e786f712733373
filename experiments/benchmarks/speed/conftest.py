"""Doctests skip the modules that import PyTorch, which need not be installed."""

collect_ignore = ["torch_contender.py", "torch_models.py"]
