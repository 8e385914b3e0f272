"""A place in host memory for tensors that wait for the backward pass; copies run beside the computation.

The forward pass stores one tensor after the other, the backward pass takes them in reverse. While a tensor is in use
the one before it is on its way back, so the computation waits for a copy only where a layer is faster than the bus.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_vram.memory import page_locked


@dataclass(eq=False)
class Parked:
    """A tensor in host memory: where it is, and its copy on the device once that is under way."""

    host: torch.Tensor
    buffer: torch.Tensor
    """The bytes that `host` is a view of, and more."""
    device: torch.device
    below: weakref.ref[Parked] | None
    """The one that was stored before it, and so is wanted after it; None once nobody wants it any more."""
    back: torch.Tensor | None = field(default=None)
    arrived: Any = None
    taken: bool = False


class Garage:
    """Stores tensors in host memory, each for one backward pass. Host buffers are pinned and used again.

    A buffer takes any tensor that isn't larger, so there are never more of them than tensors were here at one time,
    and none is larger than the largest of those needs, whatever shapes come and go.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []  # bytes, the smallest first
        self._top: weakref.ref[Parked] | None = None
        self._leaving: list[tuple[torch.Tensor, Any]] = []
        self._streams: dict[torch.device, Any] = {}

    def store(self, tensor: torch.Tensor) -> Parked:
        """Copy a tensor out. The caller may drop it at once: it is kept here until the copy is done."""
        buffer = self._buffer(tensor)
        host = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        with self._beside(tensor.device):
            host.copy_(tensor, non_blocking=True)
            departed = _event(tensor.device)
        self._leaving.append((tensor, departed))
        if len(self._leaving) > 2:
            # Its memory is free once the computation has waited for the copy: two layers later, so it hardly does.
            _wait(self._leaving.pop(0)[1])
        parked = Parked(host, buffer, tensor.device, self._top)
        self._top = weakref.ref(parked)
        return parked

    def take(self, parked: Parked) -> torch.Tensor:
        """The tensor, on its device again; and the one before it is sent for.

        Raises RuntimeError the second time: its host buffer may hold another tensor by then.
        """
        if parked.taken:
            raise RuntimeError("an offloaded checkpoint serves one backward pass")
        while self._leaving:
            _wait(self._leaving.pop()[1])
        tensor = self._send_for(parked)
        _wait(parked.arrived)
        parked.taken, parked.back = True, None
        insort(self._free, parked.buffer, key=len)
        self._top = parked.below
        following = self._top() if self._top else None
        if following is not None and not following.taken:
            self._send_for(following)
        return tensor

    def _send_for(self, parked: Parked) -> torch.Tensor:
        if parked.back is None:
            parked.back = torch.empty(parked.host.shape, dtype=parked.host.dtype, device=parked.device)
            with self._beside(parked.device):  # its memory may still be in use by what was launched before
                parked.back.copy_(parked.host, non_blocking=True)
                parked.arrived = _event(parked.device)
        return parked.back

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host buffer. One that was taken may be written at once: all copies run in one stream, in order."""
        place = bisect_left(self._free, tensor.nbytes, key=len)
        if place < len(self._free):
            return self._free.pop(place)
        size = page_locked(tensor.nbytes)
        if self._free:
            self._free.pop()  # the largest, in whose place this one comes
            if tensor.is_cuda:
                torch._C._host_emptyCache()  # torch would keep its memory
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=tensor.is_cuda)

    def _beside(self, device: torch.device) -> AbstractContextManager[Any]:
        """The stream of the copies, from where the computation is now."""
        if device.type != "cuda":
            return nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)


def _event(device: torch.device) -> Any:
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _wait(event: Any) -> None:
    if event is not None:
        torch.cuda.current_stream().wait_event(event)
