"""Triton's kernels, compiled at one time instead of one after the other as they are met."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any
from unittest.mock import patch

from triton import AsyncCompileMode
from triton.runtime import JITFunction, driver
from triton.runtime._async_compile import active_mode

from qlora_trainer.settings import usable_cpus

MOST = 8
"""Kernels at one time: the assembler and the C compiler are processes, whose memory the pod must have."""


@contextmanager
def compiling_only() -> Iterator[None]:
    """Compile the kernels that are launched here, and run none of them: what they should write is anything.

    When this ends they are all there, for launches of the same kind. Raises what a compilation raised.
    """
    run, parse, parsing = JITFunction.run, JITFunction.parse, Lock()

    def parse_alone(kernel: Any) -> Any:
        with parsing:  # Python before 3.11.8 loses count where two threads parse at one time (gh-106905)
            return parse(kernel)

    with (
        patch.object(JITFunction, "parse", parse_alone),
        ThreadPoolExecutor(min(MOST, usable_cpus())) as pool,
        _WithLaunchers(pool) as mode,
    ):

        def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            token = active_mode.set(mode)  # autograd's threads have contexts of their own
            try:
                return run(kernel, *arguments, grid=grid, warmup=True, **options)
            finally:
                active_mode.reset(token)

        with patch.object(JITFunction, "run", compile_only):
            yield


class _WithLaunchers(AsyncCompileMode):  # type: ignore[misc]
    """Compiles what launches a kernel, which takes a C compiler, together with it.

    The launcher is found among Triton's files when the kernel is launched first.
    """

    def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> Any:
        def compile_both() -> Any:
            kernel = compile_fn()
            driver.active.launcher_cls(kernel.src, kernel.metadata)
            return kernel

        return super().submit(key, compile_both, finalize_fn)

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            active_mode.set(None)  # Triton leaves it on where a compilation failed, and no kernel would run any more
