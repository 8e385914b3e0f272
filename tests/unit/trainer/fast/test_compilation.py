"""Kernels are compiled side by side before they are launched. For a GPU that isn't there: compiling needs none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from triton.runtime._async_compile import active_mode

from qlora_trainer.fast import compilation, dispatch, norm, rope
from qlora_trainer.fast.compilation import compiling_only


class H100:
    """What Triton asks of a driver until something is launched."""

    def __init__(self) -> None:
        self.launchers: list[str] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        self.launchers.append(metadata.name)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[H100]:
    """An H100 that compiles and can't run, for which nothing was compiled yet."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(dispatch, "INTERPRETED", True)  # which lets tensors on the CPU have kernels
    found = H100()
    monkeypatch.setattr(driver, "_active", found)
    yield found
    for kernel in (norm._forward, rope._rotate):
        kernel.device_caches.clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are compiled, in their order."""
    found: list[str] = []
    usual = JITFunction._do_compile

    def noted(kernel: Any, *arguments: Any) -> Any:
        found.append(kernel.fn.__name__)
        return usual(kernel, *arguments)

    monkeypatch.setattr(JITFunction, "_do_compile", noted)
    return found


def _launch() -> torch.Tensor:
    x = torch.ones(4, 64)
    norm.rms_norm(x, torch.ones(64), 1e-5)
    heads, table = x.view(4, 4, 16), torch.ones(4, 8)
    rope.rotate(heads, table, table, heads)
    return x


def test_what_is_launched_is_compiled_and_not_run(gpu: H100, compiled: list[str]) -> None:
    with compiling_only():
        x = _launch()
    assert torch.equal(x, torch.ones(4, 64))
    assert compiled == ["_forward", "_rotate"]
    assert sorted(gpu.launchers) == ["_forward", "_rotate"]
    with compiling_only():
        _launch()
    assert len(compiled) == 2  # they are there


def test_kernels_of_the_backward_pass_are_compiled_too_which_runs_in_another_thread(
    gpu: H100, compiled: list[str]
) -> None:
    with compiling_only():
        thread = threading.Thread(target=_launch)
        thread.start()
        thread.join()
    assert compiled == ["_forward", "_rotate"]


def test_what_fails_beside_the_compiling_is_told_at_the_end(gpu: H100, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gpu, "launcher_cls", fail)
    with pytest.raises(RuntimeError, match="C compiler"), compiling_only():
        _launch()
    assert active_mode.get() is None  # what is launched from now on runs


def test_two_kernels_are_not_parsed_at_one_time(gpu: H100, monkeypatch: pytest.MonkeyPatch) -> None:
    met, usual, two = [], JITFunction.parse, threading.Barrier(2)

    def parse(kernel: Any) -> Any:
        with contextlib.suppress(threading.BrokenBarrierError):
            two.wait(timeout=0.2)  # for another one that is parsed now
            met.append(kernel.fn.__name__)
        return usual(kernel)

    monkeypatch.setattr(compilation, "usable_cpus", lambda: 2)
    monkeypatch.setattr(JITFunction, "parse", parse)
    with compiling_only():
        _launch()
    assert not met
