# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxlocal/jaxlocal/blob/main/colabs/01_local_sgd.ipynb)
#
# # Local SGD: eight workers that rarely communicate
#
# Eight workers train one model together. In data parallelism they average their gradients at
# *every* step. Here each worker takes many local steps before the models are averaged. We count how
# much communication that saves, and look at what it costs.
#
# Everything runs on one device, which simulates all eight workers, or on as many devices as you
# have. It takes about half a minute on two CPU cores.

# %%
import importlib.util
import subprocess
import sys

if not importlib.util.find_spec("jaxlocal"):
    source = "jaxlocal @ git+https://github.com/jaxlocal/jaxlocal"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import jaxlocal
from jaxlocal import data, periods
from jaxlocal.models import evaluation_metrics, from_nnx, training_loss
from jaxlocal.training import Evaluation, run

# %% [markdown]
# ## A task, a model
#
# scikit-learn's handwritten digits: 1437 small images to train on, 360 to test with.

# %%
digits = data.load("digits")
train, test = digits.train(), digits.test()

figure, axes = plt.subplots(1, 12, figsize=(9, 1))
for axis, image, label in zip(axes, train["inputs"], train["targets"], strict=False):
    axis.imshow(image, cmap="gray_r")
    axis.set_title(label, fontsize=9)
    axis.axis("off")
plt.show()


# %% [markdown]
# The model is an ordinary Flax NNX module. It does not depend on the workers.


# %%
class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(8 * 8, 64, rngs=rngs)
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        return self.logits(nnx.relu(self.hidden(images.reshape(len(images), -1))))


model = from_nnx(lambda rngs: Classifier(rngs))
loss = training_loss(model, digits.normalize, digits.classes)

# %% [markdown]
# ## Local SGD
#
# Worker $i$ has its own model $x_i$. At every *step* it draws a batch, computes the gradient $g_i$
# and updates its model,
#
# $$x_i \leftarrow x_i - \eta\, g_i .$$
#
# Every $H$ steps all workers restart from the average of their models,
#
# $$x_i \leftarrow \frac{1}{8} \sum_{j=1}^{8} x_j .$$
#
# The $H$ steps between two averages are a *round*. With $H = 1$ and plain SGD this is data
# parallelism, because averaging models that started equal averages their gradients. A larger $H$
# communicates less: every worker sends one model per round.
#
# Any optax optimizer will do; each worker has its own optimizer state. `scheduled` makes one whose
# learning rate the rule for $H$ below can read.

# %%
STEPS = 512
optimizer = jaxlocal.scheduled(optax.sgd, optax.cosine_decay_schedule(0.5, STEPS))
workers = jaxlocal.Layout(workers_per_hub=8)


def local_sgd(period):
    grad_fn = jaxlocal.gradients(loss, stateful=True)
    method = jaxlocal.local_sgd(grad_fn, optimizer, period=period)
    return jaxlocal.RoundFn(method, workers, data=train)


# %% [markdown]
# ## One round, step by step
#
# All eight models are one tree of arrays that lead with `[hubs, workers]`; here there is one hub.
# `RoundFn` holds the training images, so a batch is an array of indices into them, `[steps, hubs,
# workers, batch]`. With `iid` the images are shuffled in every epoch and distributed over the
# workers.

# %%
round_fn = local_sgd(16)
iid = data.make_batches("iid", train["targets"], 1, 8, batch_size=16, seed=0)


def start(seed=0):
    params, model_state = jax.jit(model.init)(jax.random.key(seed))
    return round_fn.init(params, jax.random.key(seed), model_state)


state = start()
print("all workers' models:", jax.tree.map(np.shape, state.params))
print("batches of a round: ", iid.indices(0, 16).shape)

# %% [markdown]
# How far apart are the workers? The *consensus distance* is $\sqrt{\frac{1}{8} \sum_i \|x_i -
# u\|^2}$, where $u$ is the average model. It is zero at the start, grows during local steps, and
# the average makes it zero again.

# %%
print(f"at the start:          {round_fn.consensus_distance(state):.3f}")
state, info = round_fn.local_steps(state, iid.indices(0, 16))
print(f"after 16 local steps:  {round_fn.consensus_distance(state):.3f}")
state, _ = round_fn.end_round(state)
print(f"after the average:     {round_fn.consensus_distance(state):.3f}")

# %% [markdown]
# ## How often should they communicate?
#
# Every run has the same 512 steps, the same start and the same batches; only $H$ differs: 1, 4, 16,
# and a rule that chooses it. The *Quadratic Synchronization Rule* (QSR, [Gu et al.
# 2024](https://arxiv.org/abs/2310.14423)) lets $H$ grow as the learning rate falls,
#
# $$H = \max\left(H_\text{base}, \left\lfloor (\alpha / \eta)^2 \right\rfloor\right),$$
#
# because workers drift apart slowly when their steps are small. With $\alpha = 1$ it begins at $H =
# (1 / 0.5)^2 = 4$.

# %%
qsr = periods.qsr(optimizer.learning_rate, coefficient=1.0, base=4)
print("H of QSR's rounds:", *periods.lengths(qsr, STEPS))

# %% [markdown]
# `run` takes the steps and reports when a measurement is due. We measure the average model $u$, the
# one that would be deployed, on the test images.

# %%
evaluate = Evaluation(round_fn, evaluation_metrics(model, digits.normalize, digits.classes), test)


def curves(round_fn, batches, seed=0):
    """Metrics of the average model every 16 steps, and the bits that one worker has sent."""
    lines = [
        {"step": progress.step, "rounds": progress.round, "bits": progress.message_bits.workers}
        | {"distance": progress.distance, **evaluate(progress.state)}
        for progress in run(round_fn, start(seed), batches.indices, STEPS, measure_every=16)
        if progress.due
    ]
    return {name: np.array([line[name] for line in lines]) for name in lines[0]}


round_fns = {name: local_sgd(period) for name, period in [("H = 1", 1), ("H = 4", 4)]}
round_fns |= {"H = 16": round_fn, "QSR": local_sgd(qsr)}
results = {name: curves(fn, iid) for name, fn in round_fns.items()}


# %%
def show(results):
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    for name, c in results.items():
        kilobytes = c["bits"][1:] / 8e3
        style = {"label": name, "linestyle": "--" if name == "QSR" else "-"}
        axes[0, 0].plot(c["step"], c["loss"], **style)
        axes[0, 1].plot(kilobytes, c["loss"][1:], **style)
        axes[1, 0].plot(c["step"], c["accuracy"], **style)
        axes[1, 1].plot(c["step"][1:], c["distance"][1:], **style)
    axes[0, 0].set(xlabel="steps", ylabel="test loss", yscale="log")
    axes[0, 1].set(xlabel="kB sent by a worker", ylabel="test loss", xscale="log", yscale="log")
    axes[1, 0].set(xlabel="steps", ylabel="test accuracy", ylim=(0.5, 1))
    axes[1, 1].set(xlabel="steps", ylabel="consensus distance", ylim=(0, None))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    plt.show()


show(results)


# %%
def table(results):
    print(f"{'':8}{'accuracy':>10}{'rounds':>8}{'bits sent':>14}{'of H = 1':>10}")
    for name, c in results.items():
        share = c["bits"][-1] / results["H = 1"]["bits"][-1]
        print(
            f"{name:8}{c['accuracy'][-1]:10.3f}{c['rounds'][-1]:8.0f}{c['bits'][-1]:14,.0f}"
            f"{share:10.1%}"
        )


table(results)

# %% [markdown]
# Seeds 0 to 3 gave, and yours should too:
#
# - All four runs reach nearly the same accuracy, about 0.975: 360 test images cannot separate them.
#   Over steps the curves almost coincide.
# - Over communication they are far apart: $H = 16$ sends a sixteenth of what $H = 1$ sends, QSR a
#   tenth.
# - Workers drift further apart in longer rounds, though not in proportion: sixteen times the steps
#   make two to four times the distance. (It is measured before the average, if one is due.) It
#   falls with the learning rate, except under QSR, whose last rounds are long.
#
# So why communicate more often at all? Here the batches of all workers are alike. What if they are
# not?

# %% [markdown]
# ## Exercise: what if every worker has different digits?
#
# `sorted` gives every worker a fixed shard of the images, sorted by label. Before you run the next
# cells: which $H$ will suffer, and where will QSR end?

# %%
shards = data.assign(data.parse_partition("sorted"), train["targets"], workers=8, seed=0)
for worker, shard in enumerate(shards):
    print(f"worker {worker} has the digits", *np.unique(train["targets"][shard]))

# %%
by_label = data.make_batches("sorted", train["targets"], 1, 8, batch_size=16, seed=0)
sorted_results = {name: curves(fn, by_label) for name, fn in round_fns.items()}
show(sorted_results)
table(sorted_results)

# %% [markdown]
# Now the period matters. A worker that sees two digits for sixteen steps unlearns the others, and
# the average of eight such models is worse than one model that was trained on all digits. With
# seeds 0 to 3, $H = 1$ reaches the same accuracy as on shuffled digits, $H = 4$ loses up to one
# point and $H = 16$ about four, and it is much slower early on. QSR sends less than half of what
# $H = 4$ sends, most of it while steps are large, and ends between $H = 4$ and $H = 16$.
#
# ## Exercise: your turn
#
# - Use Adam: `optax.adam(1e-3)` as the optimizer. Nothing else changes, and every worker has its
#   own moments. Does `optimizer_state="average"` help?
# - `jaxlocal.diloco` takes the arguments of `jaxlocal.local_sgd`, and ends rounds with a step of an
#   outer optimizer with momentum instead of the plain average. Is $H = 16$ better with it, on
#   sorted digits?
# - How large may $H$ be on shuffled digits before the accuracy falls?
