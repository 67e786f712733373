"""Count what JAX compiles by its monitoring events; the cache of a jitted function over-counts."""

import contextlib

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def counted():
    """Yield a list to which the name of every program compiled inside the block is added."""
    names: list[str] = []

    def listen(event, duration, **details):
        if event == _EVENT:
            names.append(details.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
