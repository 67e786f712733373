"""Compile programs in threads before they are called."""

import contextlib
import os
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Ahead:
    """Compile programs in threads while the program goes on, as a context.

    XLA compiles without Python's lock, on about two cores for each program. JAX finds what was
    compiled when the program is called, which first waits for it by `Compiling.finished`. An error
    of a thread is left to that call, which compiles again and raises it. So does a call within
    settings of JAX that hold in its thread alone, such as `jax.default_matmul_precision`.

    At the end of the context programs that no thread has begun to compile are dropped, and those
    that are being compiled are waited for: a process cannot end during a compilation.

    >>> import jax, numpy as np
    >>> program, compiling = jax.jit(lambda x: 2 * x), Compiling()
    >>> with Ahead() as ahead:
    ...     compiling.begin("twice", program.lower(np.ones(3)), ahead)
    ...     compiling.finished("twice")
    ...     program(np.ones(3))
    Array([2., 2., 2.], dtype=float32)
    """

    def __init__(self) -> None:
        threads = max(1, (os.cpu_count() or 1) // 2)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, compile: Callable[[], Any]) -> Future:
        """Compile in a thread, after what was submitted before."""
        return self._pool.submit(compile)


class Compiling:
    """The programs that are compiled ahead and were not called yet."""

    def __init__(self) -> None:
        self._futures: dict[Hashable, Future] = {}

    def begin(self, name: Hashable, lowered: Any, ahead: Ahead) -> None:
        """Compile a lowered program, `jax.jit(f).lower(...)`."""
        self._futures[name] = ahead.submit(lowered.compile)

    def finished(self, name: Hashable) -> None:
        """Wait until a program is compiled, or fails to be, or was dropped."""
        if future := self._futures.pop(name, None):
            with contextlib.suppress(CancelledError):
                future.exception()
