"""The fast path on a CPU, in its plain pieces: gradients of transformers and PEFT, and what it doesn't cover."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from bench.models import Shape, build
from qlora_trainer.fast import heads
from qlora_trainer.fast.attention import Layout
from qlora_trainer.fast.decoder import FastDecoder, NotCoveredError
from qlora_trainer.fast.low_rank import Dropout
from qlora_trainer.fast.optimizer import keep_small_states_resident
from qlorajob.plan import Plan, Requests

SHAPES = {
    "llama": Shape("llama", 64, 128, 2, 4, 2, 320),
    "qwen2": Shape("qwen2", 64, 128, 2, 4, 2, 320),
    "qwen3": Shape("qwen3", 64, 128, 2, 6, 2, 320, head_size=16),
    "phi3": Shape("phi3", 64, 128, 2, 4, 2, 320, rotated=0.75),
}
POLICIES: dict[str, dict[str, Any]] = {
    "none": {"checkpointing": "none"},
    "partial": {"checkpointing": "partial", "checkpointed_layers": 1},
    "full": {"checkpointing": "full"},
    "offloaded": {"checkpointing": "full", "offload_checkpoints": True},
    "cached": {"checkpointing": "partial", "checkpointed_layers": 1, "cache_weights": True},
}
LENGTH = 24
SMALL_UPDATE = 5e-4
"""Of each weight of B: what a few steps at a usual learning rate make of them."""


def _plan(policy: str = "none") -> Plan:
    return Plan(
        gpu_class="cpu", gpus=0, predicted_peak_bytes=1, micro_batch_size=1, gradient_accumulation=1,
        requests=Requests(cpu="1", memory="1Gi", ephemeral_storage="1Gi"), reason="a test", **POLICIES[policy],
    )  # fmt: skip


def _model(family: str = "llama", dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    torch.manual_seed(0)
    base = build(SHAPES[family], device="cpu", dtype=dtype)
    if isinstance(lora.get("target_modules"), list):
        lora["target_modules"] = SHAPES[family].named(lora["target_modules"])
    return _adapted(base, **lora)


def _adapted(base: Any, **lora: Any) -> Any:
    for parameter in base.parameters():
        if parameter.is_floating_point() and parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    config = LoraConfig(**{"r": 5, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora})
    model = get_peft_model(base, config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def _in_float32(model: Any) -> Any:
    """The same weights, in float32 where they aren't in 4 bit."""
    found = copy.deepcopy(model).float()
    for module in found.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32
    return found


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 320, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def _gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _plain(model: Any, ids: torch.Tensor, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False, **inputs).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def _fast(decoder: FastDecoder, ids: torch.Tensor, labels: torch.Tensor, layout: Layout | None = None) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return decoder.summed_loss(ids, labels, positions, layout or Layout(len(ids)))


def _assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].norm()))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj", "gate_proj"]])
@pytest.mark.parametrize("family", SHAPES)
def test_loss_and_gradients_are_those_of_transformers_and_peft(
    family: str, targets: Any, policy: str, ids: torch.Tensor
) -> None:
    model = _model(family, target_modules=targets)
    labels = ids.clone()
    labels[0, :5] = -100
    plain = _plain(model, ids, labels)
    expected = _gradients(model, plain)
    decoder = FastDecoder(model, _plan(policy))
    for _ in range(2):
        fast = _fast(decoder, ids, labels)
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=0)
        _assert_close(_gradients(model, fast), expected)


@pytest.mark.parametrize("targets", [["v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]])
@pytest.mark.parametrize("family", SHAPES)
def test_an_update_smaller_than_16_bit_resolve_of_the_output_is_felt(family: str, targets: list[str]) -> None:
    """As a first step's is. It must be added before the output is rounded, or it's rounded away as a whole."""
    model = _model(family, torch.bfloat16, target_modules=targets)
    inputs = torch.randn(4000, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    changes = [_change_by_adapter(each, inputs) for each in (_in_float32(model), model)]
    exact, found = (change.flatten().double() for change in changes)
    assert float(found @ exact / (exact @ exact)) == pytest.approx(1, abs=0.25)


def _change_by_adapter(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    """What the adapters, made small, add to the first layer's outputs."""
    outputs = []
    for size in (0, SMALL_UPDATE):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, size)
        decoder = FastDecoder(model, _plan())
        with torch.no_grad():
            torch._foreach_copy_(decoder._copies, list[torch.Tensor](decoder.parameters))
            # Rows of a few tokens: attention to many is their mean, which is as small as what is rounded away.
            batch = decoder._batch(torch.arange(8).expand(len(inputs) // 8, 8), Layout(len(inputs) // 8))
            outputs.append(decoder.layers[0](inputs.to(decoder._head.dtype), batch).float())
    return outputs[1] - outputs[0]


@pytest.mark.parametrize("policy", ["none", "full", "offloaded"])
@pytest.mark.parametrize("family", SHAPES)
def test_dropout_is_the_same_in_forward_and_backward(
    family: str, policy: str, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's dropouts are given the fast path's masks: then even their gradients must agree."""
    model = _model(family, lora_dropout=0.4)
    decoder = FastDecoder(model, _plan(policy))
    seed = torch.tensor([99])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: seed)
    sites = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
    sites |= {"qkv_proj": 0, "gate_up_proj": 2}

    class Mask(nn.Module):
        def __init__(self, site: int) -> None:
            super().__init__()
            self.site = site

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.flatten(0, -2)
            return (flat * Dropout(0.4, seed, self.site).mask(*flat.shape) / 0.6).view_as(x)

    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            parts = name.split(".")
            module.lora_dropout["default"] = Mask(4 * int(parts[parts.index("layers") + 1]) + sites[parts[-1]])
    plain = _plain(model, ids, ids)
    expected = _gradients(model, plain)
    fast = _fast(decoder, ids, ids)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=0)
    _assert_close(_gradients(model, fast), expected)


@pytest.mark.parametrize("policy", ["none", "full", "offloaded"])
@pytest.mark.parametrize("family", SHAPES)
def test_packed_documents_are_trained_as_if_each_were_alone(family: str, policy: str, ids: torch.Tensor) -> None:
    model = _model(family)
    row, labels = ids[:1], ids[:1].clone()
    labels[0, 10] = -100  # the second document's first token: nothing comes before it
    positions = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)])[None]
    layout = Layout(1, torch.tensor([0, 10, LENGTH, LENGTH], dtype=torch.int32), LENGTH)
    packed = FastDecoder(model, _plan(policy)).summed_loss(row, labels, positions, layout)
    gradients = _gradients(model, packed)
    alone = _plain(model, row[:, :10], labels[:, :10]) + _plain(model, row[:, 10:], labels[:, 10:])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)
    _assert_close(gradients, _gradients(model, alone))


@pytest.mark.parametrize("family", SHAPES)
def test_no_document_sees_another(family: str, ids: torch.Tensor) -> None:
    decoder = FastDecoder(_model(family), _plan())
    labels = ids[:1].clone()
    labels[:, :11] = -100  # only the second document counts
    layout = Layout(1, torch.tensor([0, 10, LENGTH], dtype=torch.int32), LENGTH - 10)
    other = ids[:1].clone()
    other[:, :10] = 7
    assert torch.equal(_fast(decoder, ids[:1], labels, layout), _fast(decoder, other, labels, layout))
    assert not torch.equal(_fast(decoder, ids[:1], labels), _fast(decoder, other, labels))


def test_short_rows_have_longrope_s_short_frequencies_whatever_was_evaluated_before(ids: torch.Tensor) -> None:
    factors = {"short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], "long_factor": [8.0, 9.0, 10.0, 11.0, 12.0, 13.0]}
    config = SHAPES["phi3"].config(128)
    config.original_max_position_embeddings = LENGTH
    config.rope_parameters |= {"rope_type": "longrope", "original_max_position_embeddings": LENGTH, **factors}
    model = _adapted(build(config, device="cpu", dtype=torch.float32))
    with pytest.raises(NotCoveredError, match=f"more than {LENGTH} tokens"):
        FastDecoder(model, _plan(), LENGTH + 1)
    decoder = FastDecoder(model, _plan(), LENGTH)
    with torch.no_grad():
        long = model(input_ids=ids.repeat(1, 2), use_cache=False).logits[:, :LENGTH]
        fast = _fast(decoder, ids, ids)
        torch.testing.assert_close(fast, _plain(model, ids, ids), rtol=1e-5, atol=0)
        short = model(input_ids=ids, use_cache=False).logits
    assert float((long - short).norm() / short.norm()) > 1e-3


def test_a_backward_pass_runs_once(ids: torch.Tensor) -> None:
    loss = _fast(FastDecoder(_model(), _plan()), ids, ids)
    loss.backward(retain_graph=True)
    with pytest.raises((AttributeError, TypeError)):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.config, "model_type", "gpt_neox"), "isn't of the Llama shape"),
        (lambda model: setattr(model.config, "hidden_act", "gelu"), "activation"),
        (lambda model: setattr(model.config, "attention_dropout", 0.1), "have dropout"),
        (lambda model: setattr(model.config, "rope_parameters", {"rope_type": "dynamic"}), "position embedding"),
        (lambda model: model.lm_head.weight.requires_grad_(), "is trained too"),
        (lambda model: model.model.layers[0].self_attn.q_norm.weight.requires_grad_(), "q_norm.weight is trained too"),
        (lambda model: setattr(model.model.layers[0].mlp, "up_proj", nn.Identity()), "Identity"),
    ],
)
def test_a_model_that_is_not_covered_is_refused_with_the_reason(change: Any, reason: str) -> None:
    model = _model("qwen3")
    change(model.get_base_model())
    with pytest.raises(NotCoveredError, match=reason):
        FastDecoder(model, _plan())


def test_a_sliding_window_is_refused_where_rows_may_be_longer() -> None:
    model = _model("qwen3")
    model.config.use_sliding_window, model.config.sliding_window = True, 512
    FastDecoder(model, _plan(), 512)
    for longest in (513, None):
        with pytest.raises(NotCoveredError, match="more than 512 tokens"):
            FastDecoder(model, _plan(), longest)


@pytest.mark.parametrize("family", SHAPES)
def test_a_check_finds_the_modules_own_loss_and_leaves_no_trace(family: str) -> None:
    model = _model(family, lora_dropout=0.1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    state = torch.get_rng_state()
    FastDecoder(model, _plan("full")).check(16)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_check_refuses_a_path_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "rotate", lambda *_, **__: None)
    model = _model()
    model.get_base_model().lm_head.weight.data *= 20  # so that positions matter
    with pytest.raises(NotCoveredError, match="its loss is"):
        FastDecoder(model, _plan()).check(16)


def test_a_check_refuses_a_path_that_fails_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(heads, "rotate", fail)
    with pytest.raises(NotCoveredError, match=r"fails here: no kernel image is available$"):
        FastDecoder(_model(), _plan()).check(16)


def test_more_than_plain_lora_is_refused() -> None:
    with pytest.raises(NotCoveredError, match="more than plain LoRA"):
        FastDecoder(_model(use_dora=True), _plan())


@pytest.mark.parametrize(("memory", "resident"), [(2**20, True), (2**10, False)])
def test_an_optimizer_pages_only_states_that_are_large(memory: int, resident: bool) -> None:
    optimizer = bitsandbytes.optim.AdamW([nn.Parameter(torch.zeros(64, 64))], optim_bits=32, is_paged=True)
    assert keep_small_states_resident(optimizer, memory) is resident
    assert optimizer.is_paged is not resident
