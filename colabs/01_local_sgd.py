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
# # Local SGD: eight workers that rarely talk
#
# Eight workers train one model together. In data parallelism they send each other their gradients
# at *every* step. Here each takes many steps of its own before the models are averaged, and we
# count what that saves and look at what it costs.
#
# Everything runs on one device, which simulates all eight workers, or on as many as you have. It
# takes about half a minute on two CPU cores.

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
from jaxlocal.models import from_nnx
from jaxlocal.models.supervised import evaluation_metrics, training_loss
from jaxlocal.training.evaluation import Evaluation
from jaxlocal.training.loop import run

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
# The model is an ordinary Flax NNX module. It knows nothing of workers.


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
# Worker $i$ has a model $x_i$ of its own. At every *step* it draws a batch, computes the gradient
# $g_i$ and takes a step of its own,
#
# $$x_i \leftarrow x_i - \eta\, g_i .$$
#
# Every $H$ steps all workers restart from the average of their models,
#
# $$x_i \leftarrow \frac{1}{8} \sum_{j=1}^{8} x_j .$$
#
# The $H$ steps between two averages are a *round*. With $H = 1$ and plain SGD this is data
# parallelism: to average models that started equal is to average their gradients. A larger $H$
# says less: one model a round.
#
# The optimizer may be any of optax's; each worker runs its own copy.

# %%
STEPS = 512
learning_rate = optax.cosine_decay_schedule(0.5, STEPS)
workers = jaxlocal.Layout(workers_per_hub=8)


def local_sgd(period):
    grad_fn = jaxlocal.gradients(loss, stateful=True)
    method = jaxlocal.local_sgd(grad_fn, optax.sgd(learning_rate), period)
    return jaxlocal.RoundFn(method, workers, data=train)


# %% [markdown]
# ## One round, step by step
#
# All eight models live in one tree of arrays that lead with `[hubs, workers]`; here there is one
# hub. The training images were given to `RoundFn` once, so a batch is only their numbers, `[steps,
# hubs, workers, batch]`. Under `iid` the images are shuffled at every epoch and dealt out to the
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
# u\|^2}$, where $u$ is the average model. It is zero at the start, grows while they go their own
# ways, and the average makes it zero again.

# %%
print(f"at the start:          {round_fn.consensus_distance(state):.3f}")
state, info = round_fn.local_steps(state, iid.indices(0, 16))
print(f"after 16 local steps:  {round_fn.consensus_distance(state):.3f}")
state, _ = round_fn.end_round(state)
print(f"after the average:     {round_fn.consensus_distance(state):.3f}")

# %% [markdown]
# ## How often should they talk?
#
# We give every run the same 512 steps, the same start and the same batches, and change only $H$: 1,
# 4, 16, and one rule that chooses it. The *Quadratic Synchronization Rule* (QSR, [Gu et al.
# 2024](https://arxiv.org/abs/2310.14423)) lets $H$ grow as the learning rate falls,
#
# $$H = \max\left(H_\text{base}, \left\lfloor (\alpha / \eta)^2 \right\rfloor\right),$$
#
# because small steps drift apart slowly. With $\alpha = 1$ it begins at $H = (1 / 0.5)^2 = 4$.

# %%
qsr = periods.quadratic(learning_rate, coefficient=1.0, base=4)
print("H of QSR's rounds:", *periods.lengths(qsr, STEPS))

# %% [markdown]
# `run` takes the steps and says when a measurement is due. What we measure is the average model
# $u$, the one that would be used, on the test images.

# %%
evaluate = Evaluation(round_fn, evaluation_metrics(model, digits.normalize, digits.classes), test)


def curves(round_fn, batches, seed=0):
    """What the average model is worth every 16 steps, and what one worker has said by then."""
    progresses = run(round_fn, start(seed), batches.indices, STEPS, measure_every=16)
    lines = [
        {"step": progress.step, "rounds": progress.round, "bits": progress.message_bits.workers}
        | {"distance": progress.distance, **evaluate(progress.state)}
        for progress in progresses
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
    axes[0, 1].set(xlabel="kB said by a worker", ylabel="test loss", xscale="log", yscale="log")
    axes[1, 0].set(xlabel="steps", ylabel="test accuracy", ylim=(0.5, 1))
    axes[1, 1].set(xlabel="steps", ylabel="consensus distance", ylim=(0, None))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    plt.show()


show(results)


# %%
def table(results):
    print(f"{'':8}{'accuracy':>10}{'rounds':>8}{'bits said':>14}{'of H = 1':>10}")
    for name, c in results.items():
        share = c["bits"][-1] / results["H = 1"]["bits"][-1]
        print(
            f"{name:8}{c['accuracy'][-1]:10.3f}{c['rounds'][-1]:8.0f}{c['bits'][-1]:14,.0f}"
            f"{share:10.1%}"
        )


table(results)

# %% [markdown]
# What we saw with seeds 0 to 3, and you should see too:
#
# - All four end at nearly the same accuracy, about 0.975: 360 test images cannot tell them apart.
#   Over steps the curves all but coincide.
# - Over what was said they lie far apart: $H = 16$ sends a sixteenth of what $H = 1$ sends, QSR a
#   tenth.
# - Workers that are alone for longer drift further apart, though not in proportion: sixteen times
#   the steps make two to four times the distance. (It is measured before the average, if one is
#   due.) It falls with the learning rate, except under QSR, whose last rounds are long.
#
# So why ever talk more? Here any worker's batches look like any other's. What if they do not?

# %% [markdown]
# ## Exercise: what if every worker knows other digits?
#
# `sorted` deals out the images sorted by their labels, once and for all. Before you run the next
# cells: which $H$ will suffer, and where will QSR end?

# %%
shards = data.assign(data.parse_partition("sorted"), train["targets"], workers=8, seed=0)
for worker, shard in enumerate(shards):
    print(f"worker {worker} knows the digits", *np.unique(train["targets"][shard]))

# %%
by_label = data.make_batches("sorted", train["targets"], 1, 8, batch_size=16, seed=0)
sorted_results = {name: curves(fn, by_label) for name, fn in round_fns.items()}
show(sorted_results)
table(sorted_results)

# %% [markdown]
# Now talking matters. A worker that sees two digits for sixteen steps unlearns the others, and the
# average of eight such models is worse than one model that took its steps on all digits. With
# seeds 0 to 3, $H = 1$ does not mind who holds what, $H = 4$ loses up to one point of accuracy and
# $H = 16$ about four, and it is much slower early on. QSR says less than half of what $H = 4$ says,
# most of it while steps are large, and ends between $H = 4$ and $H = 16$.
#
# ## Exercise: your turn
#
# - Give the workers Adam: `optax.adam(1e-3)` in place of `optax.sgd(learning_rate)`. Nothing else
#   changes, and every worker keeps moments of its own. Does `optimizer_state="average"` help?
# - `jaxlocal.diloco` takes what `jaxlocal.local_sgd` takes, and ends rounds by a step of an outer
#   optimizer with momentum instead of the plain average. Is $H = 16$ better with it, on sorted
#   digits?
# - How large may $H$ be on shuffled digits before the accuracy falls?
