"""A synchronisation of the whole model or of a fragment of it, beside which steps run."""

import jax
import optax

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.collectives import broadcast_to_workers, worker_shapes
from jaxlocal.stages.outer_step import moved
from jaxlocal.stages.partial_sync import check_common
from jaxlocal.stages.sync import Others
from jaxlocal.types import Memory, Message, Mixer, Stage, Tree


def overlapped(
    steps: Stage,
    mixer: Mixer,
    outer_optimizer: optax.GradientTransformation,
    mixing_factor: float = 0.5,
    fragment: int = 0,
    fragments: int = 1,
    model_state: str = "keep",
) -> Stage:
    """An outer step of a fragment whose pseudo-gradient is averaged while steps run.

        d ← Σ a_i (y − x_i) of the fragment
        τ steps of every worker, on all of x_i, which do not wait for d
        y ← y + outer(d);  x_i ← α x_i + (1 − α) y, of the fragment

    y is the anchor. What a worker learns in the τ steps is not in d: the share α of it stays in
    x_i, and is in the next pseudo-gradient.

    The average and the steps do not depend on each other, so a program may run them at once. XLA's
    CPU backend runs them one after the other: there only the algorithm overlaps, a message is
    smaller by its fragment, and τ saves no time. Measured with JAX 0.10, two gloo processes over a
    link of limited rate, a model of 8 to 10 MB in 4 or 32 tensors, steps that do nothing but wait,
    and an average about as long as τ = 20 of them: a round took 0.92 to 1.05 times as long as with
    τ = 0, in ten pairs. On GPUs XLA's documentation has
    `--xla_gpu_enable_latency_hiding_scheduler=true` for collectives beside computation; that is not
    measured.

    Args:
      steps: what runs meanwhile, without memory of its own; `compose.sequence()` for nothing, which
        with α = 0 makes this `syncing.outer_step`.
      mixer: one that makes all workers common.
      outer_optimizer: any optax transformation; its state exists once, for all workers, and is of
        this fragment alone. It is told the run's step, for `scale_by_step`.
      mixing_factor: α, from 0 up to 1.
      fragment: which one, counted from 0; see `fragments_of`.
      fragments: into how many the model is divided.
      model_state: as in `syncing.sync`; averaged at the end, and not overlapped.

    Raises:
      ConfigurationError: the mixer leaves workers unlike, steps that keep a memory, or more
        fragments than the model has tensors.

    Source: Douillard et al., "Streaming DiLoCo with overlapping communication", 2025,
    https://arxiv.org/abs/2501.18512.
    """
    check_common("an overlapped outer step", mixer)
    if not 0 <= mixing_factor < 1:
        raise ConfigurationError(f"the mixing factor must be in [0, 1), got {mixing_factor}")
    others = Others("keep", None, model_state)
    update = optax.with_extra_args_support(outer_optimizer).update

    def own(tree, params):
        """The fragment's leaves, and None in place of the others."""
        of = fragments_of(params, fragments)
        return jax.tree.map(lambda x, number: x if number == fragment else None, tree, of)

    def init(state):
        if jax.tree.leaves(steps.init(state)):
            raise ConfigurationError("steps beside a synchronisation may keep no memory")
        return Memory(single=outer_optimizer.init(own(state.anchor, state.params)))

    def apply(state, memory, batches, context):
        anchor = own(state.anchor, state.params)
        average = mixer.average(
            jax.tree.map(moved, anchor, own(state.params, state.params)), context
        )
        state, _, info = steps.apply(state, steps.init(state), batches, context)
        gradient = jax.tree.map(lambda y, d: d[0, 0].astype(y.dtype), anchor, average)
        updates, outer = update(gradient, memory.single, anchor, step=state.step - 1)
        anchor = optax.apply_updates(anchor, updates)

        def mix(y, x):
            return y if not mixing_factor else mixing_factor * x + (1 - mixing_factor) * y

        params = own(state.params, state.params)
        mixed = jax.tree.map(lambda y, x: mix(y[None, None], x.astype(y.dtype)), anchor, params)
        state = state._replace(
            params=_put(broadcast_to_workers(mixed, params), state.params),
            anchor=_put(anchor, state.anchor),
        )
        return others.treat(state, mixer, context), Memory(single=outer), info

    def communication(state, number=0):
        payload = own(worker_shapes(state.params), state.params)
        return [
            *steps.communication(state, number),
            Message(mixer, payload),
            *others.said(mixer, state),
        ]

    return Stage(init, apply, steps.steps, communication, True, steps.turns)


def fragments_of(params: Tree, fragments: int) -> Tree:
    """By tensor, the number of the fragment to which it belongs.

    Tensors go, from the largest to the smallest, each to the fragment that is lightest so far, so
    that no message is much larger than another. Tensors of one size, such as those of the layers of
    a transformer, so come to lie in strides: layers 0, P, 2P, … are in fragment 0.

    >>> layer = jax.numpy.ones(8)
    >>> fragments_of({"head": layer[:4], "layers": [layer, layer, layer, layer]}, 2)
    {'head': 0, 'layers': [0, 1, 0, 1]}
    """
    leaves, structure = jax.tree.flatten(params)
    if not 1 <= fragments <= len(leaves):
        raise ConfigurationError(
            f"a model of {len(leaves)} tensors does not divide into {fragments} fragments"
        )
    sizes = [x.size * x.dtype.itemsize for x in leaves]
    weights, numbers = [0] * fragments, [0] * len(leaves)
    for place in sorted(range(len(leaves)), key=lambda place: -sizes[place]):
        numbers[place] = weights.index(min(weights))
        weights[numbers[place]] += sizes[place]
    return jax.tree.unflatten(structure, numbers)


def _put(part: Tree, whole: Tree) -> Tree:
    """The tree with the leaves of a part of it in the place of its own."""
    is_none = lambda x: x is None
    return jax.tree.map(lambda new, old: old if new is None else new, part, whole, is_leaf=is_none)
