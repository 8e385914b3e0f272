"""Reading and writing weight files one tensor at a time."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_trainer.checkpoint_files import (
    DTYPES,
    SHARD_BYTES,
    Checkpoint,
    TensorInfo,
    index_of,
    plan_shards,
    write_shard,
)
from qlorajob.errors import Reason, StepError

infos = st.lists(
    st.builds(
        TensorInfo,
        name=st.text(min_size=1, max_size=12),
        dtype=st.sampled_from(list(DTYPES.values())),
        shape=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda info: info.name,
)


def values_of(info: TensorInfo) -> torch.Tensor:
    """Some values, the same for the same tensor."""
    generator = torch.Generator().manual_seed(sum(info.name.encode()))
    return torch.randint(0, 2, info.shape, generator=generator).to(info.dtype)


@given(infos, st.integers(1, 400))
def test_shards_hold_every_tensor_once_and_in_order_and_none_is_needlessly_large(
    tensors: list[TensorInfo], limit: int
) -> None:
    shards = plan_shards(tensors, limit)
    assert [tensor for shard in shards for tensor in shard.tensors] == tensors
    assert all(shard.bytes <= limit or len(shard.tensors) == 1 for shard in shards)
    assert len({shard.file for shard in shards}) == len(shards)


@given(infos)
def test_a_written_shard_is_read_by_the_library_as_it_was(tensors: list[TensorInfo]) -> None:
    (shard,) = plan_shards(tensors, SHARD_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / shard.file
        write_shard(path, shard, values_of)
        read = load_file(path)
        with safe_open(path, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # without it transformers refuses the file
    assert read.keys() == {tensor.name for tensor in tensors}
    for tensor in tensors:
        assert read[tensor.name].dtype == tensor.dtype
        assert torch.equal(read[tensor.name], values_of(tensor))


def test_a_tensor_of_another_type_than_announced_is_an_error(tmp_path: Path) -> None:
    (shard,) = plan_shards([TensorInfo("weight", torch.bfloat16, (2, 2))])
    with pytest.raises(ValueError, match=r"weight is torch\.float32"):
        write_shard(tmp_path / shard.file, shard, lambda _: torch.zeros(2, 2))


def test_the_index_says_which_file_holds_which_tensor() -> None:
    shards = plan_shards([TensorInfo(name, torch.float32, (8,)) for name in "abc"], limit=64)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index_of(shards) == {
        "metadata": {"total_size": 96},
        "weight_map": {"a": first, "b": first, "c": second},
    }


def test_a_checkpoint_in_parts_is_read_as_one(tmp_path: Path) -> None:
    weights = {name: torch.randn(3) for name in "abcd"}
    parts = dict(zip("abcd", ["one.safetensors", "two.safetensors"] * 2, strict=True))
    for part in set(parts.values()):
        save_file({name: weights[name] for name in weights if parts[name] == part}, tmp_path / part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors.keys() == weights.keys()
    assert all(torch.equal(checkpoint.read(name), value) for name, value in weights.items())


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="there is none of") as caught:
        Checkpoint.open(tmp_path)
    assert (caught.value.reason, caught.value.field) == (Reason.MODEL_INVALID, "model.uri")


def test_weights_in_8_bit_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(StepError, match="weight has the type F8_E4M3: name the original 16-bit model"):
        Checkpoint.open(tmp_path)
