"""The fast path on a GPU: gradients against a float32 reference, documents apart, policies and graphs equal."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from bench.models import SHAPES, Shape, build
from qlora_trainer.batches import DOCUMENT_ENDS, LONGEST_DOCUMENT
from qlora_trainer.fast.attention import Layout
from qlora_trainer.fast.decoder import FastDecoder
from qlora_trainer.fast.heads import Heads
from qlora_trainer.fast.step import MicroStep
from qlorajob.plan import Plan, Requests

SMALL = Shape("llama", 512, 1024, 3, 4, 2, 2048)
SMALL_QWEN2 = Shape("qwen2", 448, 1152, 3, 7, 1, 3000)
SMALL_QWEN3 = Shape("qwen3", 384, 1024, 3, 8, 2, 3000, head_size=64)
SMALL_PHI3 = Shape("phi3", 384, 1024, 3, 4, 2, 3000, rotated=0.75)
SMALL_SHAPES = {"llama": SMALL, "qwen2": SMALL_QWEN2, "qwen3": SMALL_QWEN3, "phi3": SMALL_PHI3}
ROWS, LENGTH = 3, 192


def _plan(**changes: Any) -> Plan:
    return Plan.model_validate(
        {
            "gpuClass": "test", "gpus": 1, "predictedPeakBytes": 0, "microBatchSize": 1, "gradientAccumulation": 1,
            "checkpointing": "none", "requests": Requests(cpu="1", memory="1Gi", ephemeral_storage="1Gi"),
            "reason": "a test", **changes,
        }
    )  # fmt: skip


def _model(shape: Shape, *, rank: int = 8, targets: Any = "all-linear", dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(1)
    model = build(shape, **options)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data += 0.1 * torch.randn_like(parameter)  # they are all 1
    if isinstance(targets, list):
        targets = shape.named(targets)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config).train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model


def _in_float32(model: Any) -> Any:
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
            module.compute_type_is_set = True
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_floating_point():
                module._parameters[name] = torch.nn.Parameter(parameter.data.float(), parameter.requires_grad)
    return reference


def _ids(vocabulary: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (ROWS, LENGTH), generator=generator).cuda()


def _gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _plain_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def _fast_loss(decoder: FastDecoder, ids: torch.Tensor, labels: torch.Tensor, layout: Layout | None = None) -> Any:
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return decoder.summed_loss(ids, labels, positions, layout or Layout(len(ids)))


def _error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest error of any parameter's gradient by norm."""
    assert found.keys() == expected.keys()
    return max(float((found[n].float() - expected[n].float()).norm() / expected[n].float().norm()) for n in expected)


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param(SMALL, {}, id="llama"),
        pytest.param(SMALL_QWEN2, {}, id="qwen2"),
        pytest.param(SMALL_QWEN3, {}, id="qwen3"),
        pytest.param(replace(SMALL_QWEN3, head_size=128), {"targets": ["q_proj", "k_proj"]}, id="qwen3 q and k"),
        pytest.param(SMALL_QWEN3, {"dtype": torch.float16}, id="qwen3 float16"),
        pytest.param(SMALL_PHI3, {}, id="phi3"),
        pytest.param(SMALL_PHI3, {"targets": ["q_proj", "up_proj"], "rank": 24}, id="phi3 qkv and gate_up"),
        pytest.param(replace(SMALL_PHI3, heads=6, rotated=1.0), {}, id="phi3 rotated wholly"),
        pytest.param(SMALL, {"double_quant": False, "targets": ["q_proj", "v_proj"], "rank": 64}, id="q and v"),
        pytest.param(SMALL, {"targets": ["down_proj", "up_proj"], "rank": 24}, id="down and up"),
        pytest.param(SMALL, {"dtype": torch.float16}, id="float16"),
        pytest.param(SMALL, {"quant_type": "fp4"}, id="fp4"),
    ],
)
def test_gradients_are_as_near_to_float32_as_the_plain_path_s(
    shape: Shape, options: dict[str, Any], policy: str
) -> None:
    model = _model(shape, **options)
    ids = _ids(shape.vocabulary)
    labels = ids.clone()
    labels[:, :20] = -100
    reference = _in_float32(model)
    exact = _plain_loss(reference, ids, labels)
    expected = _gradients(reference, exact)
    with torch.autocast("cuda", options.get("dtype", torch.bfloat16)):
        loss = _plain_loss(model, ids, labels)
    plain = _error(_gradients(model, loss), expected)
    fast_loss = _fast_loss(FastDecoder(model, _plan(checkpointing=policy)), ids, labels)
    fast = _error(_gradients(model, fast_loss), expected)
    print(f"error by norm: plain {plain:.2e}, fast {fast:.2e}; loss {float(exact):.4f} {float(fast_loss):.4f}")
    assert float(fast_loss) == pytest.approx(float(exact), rel=2e-3)
    assert fast < max(1.2 * plain, 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qkv", "out", "down"])
def test_an_update_smaller_than_16_bit_resolve_arrives_in_the_product(name: str) -> None:
    """cuBLAS rounds a product before it adds it to a matrix, so that of such an update only half arrives there."""
    decoder = FastDecoder(_model(SMALL), _plan())
    torch._foreach_copy_(decoder._copies, list[torch.Tensor](decoder.parameters))
    group = getattr(decoder.layers[0], name)
    x = torch.randn(4096, group.inputs, device="cuda", dtype=torch.bfloat16)
    low, roomy = x @ group.a.T, group.given_room(x)
    roomy[:, group.inputs :] = low
    frozen = group.product(x, decoder._buffer).float()
    group.b.mul_(1e-3 * frozen.std() / (group.scale * low @ group.b.T).std())
    update = group.scale * low.float() @ group.b.float().T
    change = group.product(roomy, decoder._buffer).float() - frozen
    assert float((change * update).sum() / update.square().sum()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("queries", "keys", "size"), [(32, 8, 128), (14, 2, 64), (5, 1, 96)])
def test_norms_of_heads_are_those_of_plain_torch(queries: int, keys: int, size: int) -> None:
    tokens, generator = 300, torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    product, angles = random(tokens, (queries + 2 * keys) * size), random(tokens, size // 2).float()
    weight, grads = random(queries + keys, size), [random(tokens, count, size) for count in (queries, keys, keys)]

    def run(device: str) -> list[torch.Tensor]:
        heads, kept = Heads(queries, keys, size, weight.to(device), 1e-6), product.to(device, copy=True)
        cos, sin = angles.to(device).cos(), angles.to(device).sin()
        heads.settle(kept, cos, sin)
        q, k, _ = heads.read(kept, cos, sin)
        dq, dk, dv = (grad.to(device) for grad in grads)
        heads.backward((dq, dk, dv), kept, cos, sin)
        return [q.cpu(), k.cpu(), kept.cpu()]

    for found, expected in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("family", SMALL_SHAPES)
def test_every_checkpointing_policy_gives_the_same_gradients(family: str, dropout: float) -> None:
    shape = SMALL_SHAPES[family]
    model, ids = _model(shape, dropout=dropout), _ids(shape.vocabulary)

    def gradients(**plan: Any) -> dict[str, torch.Tensor]:
        decoder = FastDecoder(model, _plan(**plan))
        for _ in range(2):
            torch.manual_seed(5)
            found = _gradients(model, _fast_loss(decoder, ids, ids))
        return found

    expected = gradients()
    for plan in (
        {"checkpointing": "full"},
        {"checkpointing": "partial", "checkpointedLayers": 2},
        {"checkpointing": "full", "offloadCheckpoints": True},
        {"checkpointing": "none", "cacheWeights": True},
        {"checkpointing": "full", "cacheWeights": True},
    ):
        assert _error(gradients(**plan), expected) < 2e-3, plan


def test_dropout_drops_its_share_and_keeps_the_expectation() -> None:
    from qlora_trainer.fast.low_rank import Dropout, dropped

    x = torch.ones(4096, 1000, device="cuda", dtype=torch.bfloat16)
    one = dropped(x, Dropout(0.1, torch.tensor([7], device="cuda"), 0))
    other = dropped(x, Dropout(0.1, torch.tensor([7], device="cuda"), 1))
    again = dropped(x, Dropout(0.1, torch.tensor([7], device="cuda"), 0))
    assert float((one == 0).float().mean()) == pytest.approx(0.1, abs=1e-3)
    assert float(one.float().mean()) == pytest.approx(1, abs=5e-3)
    assert torch.equal(one, again)
    assert float(((one == 0) & (other == 0)).float().mean()) == pytest.approx(0.01, abs=1e-3)
    assert torch.equal(one.cpu() == 0, ~Dropout(0.1, torch.tensor([7]), 0).mask(*x.shape))


@pytest.mark.parametrize("family", SMALL_SHAPES)
def test_no_document_sees_another(family: str) -> None:
    """Of two packed documents the first is changed: the second's loss and its gradients stay equal to the bit."""
    shape = SMALL_SHAPES[family]
    model = _model(shape)
    decoder = FastDecoder(model, _plan())
    ids = _ids(shape.vocabulary)[:1]
    labels = ids.clone()
    labels[:, :81] = -100  # only the second document counts
    layout = Layout(1, torch.tensor([0, 80, LENGTH], dtype=torch.int32, device="cuda"), 112)
    losses, gradients = [], []
    for first in (5, 6):
        changed = ids.clone()
        changed[:, :80] = first
        loss = _fast_loss(decoder, changed, labels, layout)
        losses.append(float(loss))
        gradients.append(_gradients(model, loss))
    alone = _fast_loss(decoder, ids[:, 80:], labels[:, 80:])
    assert losses[0] == losses[1]
    assert _error(gradients[0], gradients[1]) < 1e-5
    assert losses[0] != float(_fast_loss(decoder, ids, labels))  # without the documents' ends it does see it
    assert losses[0] == pytest.approx(float(alone), rel=0.05)  # other positions, which rotate alike


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", SMALL_SHAPES)
def test_a_captured_step_adds_the_gradients_of_an_eager_one(family: str, packed: bool) -> None:
    shape = SMALL_SHAPES[family]
    model = _model(shape)
    decoder = FastDecoder(model, _plan())
    backward = torch.Tensor.backward
    batches = []
    for seed in range(4):
        ids = _ids(shape.vocabulary, seed)
        batch = {"input_ids": ids, "labels": ids}
        if packed:
            cut = 50 + 7 * seed
            row = [cut, LENGTH - cut]
            batch["position_ids"] = torch.cat([torch.arange(size) for size in row]).expand(ROWS, -1).cuda()
            ends = torch.tensor([0, *(row * ROWS)]).cumsum(0, dtype=torch.int32)
            batch |= {DOCUMENT_ENDS: ends.cuda(), LONGEST_DOCUMENT: max(row)}
        batches.append(batch)

    def run(*, graphs: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        step = MicroStep(decoder, backward, graphs=graphs)
        model.zero_grad()
        for _ in range(2):  # the second round, after transformers' zero_grad, is all graphs
            model.zero_grad()
            losses = [float(step(batch, ROWS * LENGTH)) for batch in batches]
        return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    losses, gradients = run(graphs=True)
    expected_losses, expected = run(graphs=False)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert _error(gradients, expected) < 5e-3


def test_a_model_of_70b_is_built_in_a_minute_and_fits() -> None:
    model = build(SHAPES["llama-2-70b"], max_length=512)
    assert torch.cuda.memory_allocated() < 40 * 2**30
    del model
    torch.cuda.empty_cache()
