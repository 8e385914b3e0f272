"""The weight files of a model, one tensor at a time: read lazily, written in shards. No file is ever held whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qlorajob.errors import Reason, StepError

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD_BYTES = 5_000_000_000
"""Largest shard, of one tensor or more: what can be fetched again after a broken connection without regret."""
ALIGNMENT = 8
"""Bytes that the data of a safetensors file starts at a multiple of."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the safetensors format's names. Models in other types are quantized already, which prepare refuses."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file, without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of a model folder, by the names that its files give them."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._opened: tuple[Path, Mapping[str, torch.Tensor]] | None = None
        for file in files:
            for info in _contents(file):
                self.tensors[info.name] = info
                self._file_of[info.name] = file

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """The files that transformers would load from a folder. Raises StepError when there are none."""
        for whole, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLE, PICKLE_INDEX)):
            if (folder / whole).exists():
                return cls([folder / whole])
            if (folder / index).exists():
                parts = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
                return cls(folder / part for part in sorted(set(parts)))
        message = f"model.uri: there is none of {SAFETENSORS}, {PICKLE} and their indexes: nothing to merge into"
        raise StepError(Reason.MODEL_INVALID, message, field="model.uri")

    def read(self, name: str) -> torch.Tensor:
        """The values of one tensor, from the disk.

        A safetensors file is opened anew each time: pages that are mapped count as this process's memory.
        """
        file = self._file_of[name]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)  # type: ignore[no-any-return]
        if self._opened is None or self._opened[0] != file:
            self._opened = (file, _unpickle(file))
        return self._opened[1][name].detach()


def _contents(file: Path) -> Iterator[TensorInfo]:
    if file.suffix != ".safetensors":
        for name, tensor in torch.load(file, map_location="meta", weights_only=True).items():
            yield TensorInfo(name, tensor.dtype, tuple(tensor.shape))
        return
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            tensor = opened.get_slice(name)
            if tensor.get_dtype() not in DTYPES:
                message = f"model.uri: {name} has the type {tensor.get_dtype()}: name the original 16-bit model"
                raise StepError(Reason.MODEL_INVALID, message, field="model.uri")
            yield TensorInfo(name, DTYPES[tensor.get_dtype()], tuple(tensor.get_shape()))


def _unpickle(file: Path) -> Mapping[str, torch.Tensor]:
    """A .bin file, mapped into memory rather than read. Those from before torch 1.6 can only be read whole."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # type: ignore[no-any-return]
    except RuntimeError:
        return torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file to write, and what goes into it."""

    file: str
    tensors: tuple[TensorInfo, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensors' values."""
        return sum(tensor.bytes for tensor in self.tensors)


def plan_shards(tensors: Sequence[TensorInfo], limit: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """Cut the tensors, in their order, into files of at most `limit` bytes, named as transformers looks for them."""
    groups: list[list[TensorInfo]] = [[]]
    room = limit
    for tensor in tensors:
        if groups[-1] and tensor.bytes > room:
            groups.append([])
            room = limit
        groups[-1].append(tensor)
        room -= tensor.bytes
    if len(groups) == 1:
        return (Shard(SAFETENSORS, tuple(groups[0])),)
    return tuple(
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    )


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    return {
        "metadata": {"total_size": sum(shard.bytes for shard in shards)},
        "weight_map": {tensor.name: shard.file for shard in shards for tensor in shard.tensors},
    }


def write_shard(path: Path, shard: Shard, values: Callable[[TensorInfo], torch.Tensor]) -> None:
    """Write a safetensors file tensor by tensor. The library's own writer would hold all of them in memory.

    `values` gives a tensor in the type and shape that the shard says.
    """
    # Wide types first: then each tensor starts at a multiple of its element size, as readers that map the file need.
    tensors = sorted(shard.tensors, key=lambda tensor: -tensor.dtype.itemsize)
    with path.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            value = values(tensor)
            if value.dtype != tensor.dtype or tuple(value.shape) != tensor.shape:
                raise ValueError(f"{tensor.name} is {value.dtype}{tuple(value.shape)}, not {tensor}")
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _header(tensors: Sequence[TensorInfo]) -> bytes:
    """Length, then JSON: https://huggingface.co/docs/safetensors/index#format."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.bytes
        entries[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
