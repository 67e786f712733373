"""The convergence bound of Multi-Level Local SGD beside exact moments and measured runs."""
