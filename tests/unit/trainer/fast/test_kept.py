"""What a layer keeps on the fast path, and what stays, is what the planner counts, tensor by tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bench.models import build
from qlora_trainer.fast.attention import Layout
from qlora_trainer.fast.decoder import FastDecoder
from qlora_vram.facts import model_facts
from qlora_vram.fast import FastStep
from tests.unit.trainer.fast.test_decoder import SHAPES, _plan
from tests.unit.vram.workloads import workload

TOKENS = 64


@pytest.mark.parametrize("family", SHAPES)
def test_a_layer_keeps_what_is_planned(family: str) -> None:
    facts = model_facts(SHAPES[family].config(TOKENS).to_dict())
    assert facts is not None
    step = FastStep(workload(facts, 1, TOKENS, checkpointed=0, rank=5, engine="fast"))
    base = build(SHAPES[family], device="cpu", dtype=torch.bfloat16)
    lora = LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM")
    decoder = FastDecoder(get_peft_model(base, lora), _plan())
    layer, batch = decoder.layers[0], decoder._batch(torch.arange(TOKENS)[None], Layout(1))
    with torch.no_grad():
        kept = layer.keep(torch.randn(TOKENS, SHAPES[family].hidden, dtype=torch.bfloat16), batch)
        layer.finish(kept, batch)
    assert _bytes(kept) == step.kept - step._statistics  # a CPU's attention leaves none
    copies = [tensor for group in layer.groups for tensor in (group.a, group.b)]
    assert len(decoder.layers) * sum(tensor.nbytes for tensor in copies) == step.standing["adapter"]
    assert decoder._buffer.nbytes == step.standing["dequantization"]


def _bytes(kept: Any) -> int:
    tensors = [kept.x, kept.qkv, kept.attended.out, kept.middle, kept.gate_up, *kept.low, kept.low_down]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    return sum(tensor.nbytes for tensor in tensors)
