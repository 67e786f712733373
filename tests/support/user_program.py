"""A user's program in ten lines, for `mypy --strict` against the installed wheel.

optax, which it imports, has no types.
"""

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

import jaxlocal


def loss(w: jax.Array, batch: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.mean((w - batch) ** 2)


optimizer = jaxlocal.scheduled(optax.sgd, optax.cosine_decay_schedule(0.25, 40))
period = jaxlocal.periods.qsr(optimizer.learning_rate, coefficient=0.5, base=4)
method = jaxlocal.local_sgd(jaxlocal.gradients(loss), optimizer, period=period)
round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
state = round_fn.init(jnp.zeros(()), jax.random.key(0))
for length in jaxlocal.training.schedule(method, 40):
    state, info = round_fn(state, jnp.ones((length, 1, 2, 8)), length=length)
print(round_fn.mean(state)[0], round_fn.message_bits(state, 40, 5).workers)


def slips() -> None:
    """What a type checker refuses: with `--strict` a comment that ignores nothing is an error."""
    grad_fn = jaxlocal.gradients(loss)
    jaxlocal.local_sgd(grad_fn, optimizer, perod=4)  # type: ignore[call-arg]
    jaxlocal.local_sgd(grad_fn, optimizer, 4)  # type: ignore[call-arg]
    jaxlocal.local_sgd(grad_fn, optimizer, period="4")  # type: ignore[arg-type]
    print(jaxlocal.no_such_thing)  # type: ignore[attr-defined]
