"""PyTorch, which need not be installed, stands at the top of one module."""

collect_ignore = ["in_torch.py"]
