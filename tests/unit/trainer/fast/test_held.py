"""Weights that are held in 16 bit are those that would be dequantized, in as much memory as is planned."""

from __future__ import annotations

from itertools import product
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from bench.models import build
from qlora_trainer.fast.decoder import FastDecoder
from qlora_trainer.fast.linears import Group, Linear
from qlora_vram.facts import model_facts
from qlora_vram.fast import FastStep
from tests.unit.trainer.fast.test_decoder import SHAPES, _adapted, _plan
from tests.unit.vram.workloads import workload

INPUTS = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TARGETS: dict[str, Any] = {
    "all": "all-linear", "attention": ["q_proj", "v_proj"], "mlp": ["gate_proj", "down_proj"],
}  # fmt: skip


@pytest.mark.parametrize(("family", "targets"), product(SHAPES, TARGETS))
def test_as_much_is_held_as_is_planned(family: str, targets: str) -> None:
    shape = SHAPES[family]
    names = TARGETS[targets] if targets == "all" else shape.named(TARGETS[targets])
    facts = model_facts(shape.config(64).to_dict())
    assert facts is not None
    adapted = tuple(each for each in facts.linears if targets == "all" or each.name in names)
    work = workload(facts, 1, 64, rank=5, engine="fast", targets=adapted, cached=True)
    model = _adapted(build(shape, device="cpu", dtype=torch.bfloat16), target_modules=names)
    decoder = FastDecoder(model, _plan("cached"))
    held = [group._held for layer in decoder.layers for group in layer.groups]
    assert sum(each.untyped_storage().nbytes() for each in held) == FastStep(work).standing["weightCache"]
    assert (decoder._buffer.numel(), "dequantization" in FastStep(work).standing) == (0, False)


@pytest.mark.parametrize("family", SHAPES)
def test_a_check_needs_no_buffer(family: str) -> None:
    """Nor does what transformers' modules compute beside it, in an evaluation."""
    model = _adapted(build(SHAPES[family], device="cpu", dtype=torch.float32), lora_dropout=0.1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    FastDecoder(model, _plan("cached")).check(16)


def _linear(outputs: int, dtype: torch.dtype, *, quantized: bool, bias: bool, rank: int) -> Linear:
    base: Any = nn.Linear(INPUTS, outputs, bias=bias).to(dtype)
    if quantized:
        own = bitsandbytes.nn.Linear4bit(INPUTS, outputs, bias=bias, compute_dtype=dtype, quant_type="nf4")
        own.load_state_dict(base.state_dict())
        base = own.to("cpu")
    if not rank:
        return Linear(base)
    a, b = nn.Parameter(torch.randn(rank, INPUTS)), nn.Parameter(torch.randn(outputs, rank))
    return Linear(base, a, b, scale=0.5)


def _group(kinds: tuple[bool, ...], dtype: torch.dtype, *, bias: bool, ranks: tuple[int, ...]) -> Group:
    torch.manual_seed(0)
    linears = [
        _linear(outputs, dtype, quantized=quantized, bias=bias, rank=rank)
        for outputs, quantized, rank in zip((32, 16), kinds, ranks, strict=False)
    ]
    return Group(linears, dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("roomy", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [(0, 0), (5, 0), (5, 20)], ids=str)
@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False,), (True,)], ids=str)
def test_a_held_weight_computes_what_a_dequantized_one_does(
    kinds: tuple[bool, ...], ranks: tuple[int, ...], bias: bool, roomy: bool, dtype: torch.dtype
) -> None:
    """Layers that bitsandbytes left alone too; and when the adapter, which shares the weight's rows, has changed."""
    group = _group(kinds, dtype, bias=bias, ranks=ranks)
    held = _group(kinds, dtype, bias=bias, ranks=ranks)
    held.hold(roomy=roomy)
    buffer, none = torch.empty(group.outputs * group.row, dtype=dtype), torch.empty(0, dtype=dtype)
    x = torch.randn(7, INPUTS).to(dtype)
    for _ in range(2):
        for each in (group, held):
            for copy, parameter in zip(each.copies, each.parameters, strict=True):
                copy.copy_(parameter)
        wide = group.given_room(x)
        wide[:, INPUTS:] = (x @ group.a.T) if group.rank else 0
        inputs = [x, wide] if roomy else [x]
        for each in inputs:
            torch.testing.assert_close(held.product(each, none), group.product(each, buffer))
        assert torch.equal(held.weight(none), group.weight(buffer))
        for parameter in (*group.parameters, *held.parameters):
            parameter.data += 1
