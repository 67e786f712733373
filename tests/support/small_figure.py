"""A figure of two methods that runs in seconds."""

TUNED = """
title = "Two methods"
source = "nobody, 2026"
x = "step"
y = ["train_loss"]
[flags]
dataset = "least_squares"
model = "linear"
workers = 2
batch_size = 8
steps = 8
momentum = 0
eval_every = 4
checkpoint_every = 0
schedule = "constant"
[small]
seeds = 2
differs = ["its size"]
cost = "seconds"
[[curves]]
name = "Local SGD, H = 4"
flags = { local_steps = 4 }
tune = { learning_rate = [1e-3, 0.05] }
published = { train_loss = 0.5 }
[[curves]]
name = "data parallel"
flags = { method = "data_parallel", learning_rate = 0.05 }
"""
