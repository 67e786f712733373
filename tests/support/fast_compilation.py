"""Compile the programs of tests in a third of the time, into slower code.

A program of a test runs for milliseconds and compiles for seconds, most of which XLA's CPU compiler
spends on code that pays off in long runs. JAX has no setting for the compiler options of all
programs of a process that can be changed while it runs, so the options are added to those that JAX
makes for each program. Tests that are marked `optimized` keep the compiler's own defaults: those
that compare different programs to the bit, and those that read compiled programs.
"""

import contextlib
import functools

import jax
from jax._src import compiler

# Classic code generation, without LLVM's optimisations, in one thread: there are as many as cores.
OPTIONS = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
_enabled = True


def install() -> None:
    """Compile all programs from here on with `OPTIONS`."""
    make = compiler.get_compile_options

    @functools.wraps(make)
    def get_compile_options(*arguments, **settings):
        options = make(*arguments, **settings)
        if _enabled:  # what a caller asks for comes last, and holds
            options.env_option_overrides = [*known().items(), *options.env_option_overrides]
        return options

    compiler.get_compile_options = get_compile_options


@functools.cache
def known() -> dict[str, bool | int]:
    """Those of `OPTIONS` that the compiler of this version of JAX has."""
    lowered, found = jax.jit(lambda x: x).lower(0.0), {}
    for name, value in OPTIONS.items():
        with disabled(), contextlib.suppress(jax.errors.JaxRuntimeError):
            lowered.compile(compiler_options={name: value})
            found[name] = value
    return found


@contextlib.contextmanager
def disabled():
    """Compile with the defaults of the compiler inside the block."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
