"""Checkpointing policies: equal gradients, and only the planned layers compute twice."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_trainer.fast.checkpointing import checkpoint_layers, decoder_layers
from qlora_trainer.fast.offload import Garage
from qlora_vram.memory import page_locked
from qlorajob.plan import Plan
from tests.unit.trainer.jobs import Job

POLICIES = {
    "none": {"checkpointing": "none"},
    "partial": {"checkpointing": "partial", "checkpointed_layers": 1},
    "full": {"checkpointing": "full"},
    "offloaded": {"checkpointing": "full", "offload_checkpoints": True},
    "partly offloaded": {"checkpointing": "partial", "checkpointed_layers": 1, "offload_checkpoints": True},
}
CHECKPOINTED = {"none": 0, "partial": 1, "full": 2, "offloaded": 2, "partly offloaded": 1}


@pytest.fixture
def model(model_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()


def _plan(job: Job, policy: str) -> Plan:
    plan = job.config().plan
    assert plan is not None
    return plan.model_copy(update=POLICIES[policy])


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ids = torch.arange(2, 26).reshape(2, 12)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_those_of_no_checkpointing_in_every_step(job: Job, model: Any, policy: str) -> None:
    expected = _gradients(model)
    assert checkpoint_layers(model, _plan(job, policy)) is None
    for _ in range(2):  # the second step uses the host buffers of the first
        found = _gradients(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_only_the_planned_layers_compute_twice(job: Job, model: Any, policy: str) -> None:
    passes: Counter[int] = Counter()
    for number, layer in enumerate(decoder_layers(model)):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: passes.update([number]))
    checkpoint_layers(model, _plan(job, policy))
    _gradients(model)
    assert [passes[number] for number in range(2)] == [1 + (number < CHECKPOINTED[policy]) for number in range(2)]


def test_a_model_whose_layers_cannot_be_told_apart_is_checkpointed_by_its_own_switch(job: Job) -> None:
    class Foreign(nn.Module):
        switched: Any = None

        def gradient_checkpointing_enable(self, options: dict[str, bool]) -> None:
            self.switched = options

    foreign = Foreign()
    assert checkpoint_layers(foreign, _plan(job, "none")) is None
    assert foreign.switched is None
    reason = checkpoint_layers(foreign, _plan(job, "partial"))
    assert reason is not None
    assert "every layer" in reason
    assert foreign.switched == {"use_reentrant": False}


def test_a_tensor_that_is_parked_may_change_before_it_is_taken() -> None:
    garage, tensor = Garage(), torch.arange(6.0)
    parked = garage.store(tensor)
    tensor.zero_()
    assert garage.take(parked).tolist() == [0, 1, 2, 3, 4, 5]


def test_tensors_are_taken_in_any_order() -> None:
    garage = Garage()
    parked = [garage.store(torch.full((3,), float(number))) for number in range(4)]
    assert [garage.take(parked[number])[0].item() for number in (3, 1, 0, 2)] == [3, 1, 0, 2]


def test_host_memory_is_that_of_the_largest_micro_batch_however_lengths_change(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, hidden, lengths = 3, 8, [5, 40, 7, 64, 33, 64, 12, 50]
    held: list[weakref.ref[torch.Tensor]] = []
    empty = torch.empty

    def noted(*arguments: Any, **options: Any) -> torch.Tensor:
        made = empty(*arguments, **options)
        held.append(weakref.ref(made))
        return made

    monkeypatch.setattr(torch, "empty", noted)
    garage = Garage()
    for length in lengths:
        tensors = [torch.randn(length, hidden) for _ in range(layers)]
        parked = [garage.store(tensor) for tensor in tensors]
        for tensor, one in zip(reversed(tensors), reversed(parked), strict=True):
            assert torch.equal(garage.take(one), tensor)
        del parked, one
        assert sum(buffer.nbytes for ref in held if (buffer := ref()) is not None) <= layers * page_locked(
            4 * 64 * hidden
        )


def test_a_buffer_serves_another_type_and_shape() -> None:
    garage = Garage()
    garage.take(garage.store(torch.ones(3, 5)))
    tensor = torch.arange(12, dtype=torch.bfloat16).view(2, 6).T  # not contiguous
    assert torch.equal(garage.take(garage.store(tensor)), tensor)


def test_a_tensor_is_taken_once() -> None:
    garage = Garage()
    parked = garage.store(torch.ones(2))
    garage.take(parked)
    with pytest.raises(RuntimeError, match="one backward pass"):
        garage.take(parked)


def test_a_tensor_that_nobody_wants_any_more_is_not_sent_for() -> None:
    garage = Garage()
    garage.store(torch.ones(2))  # its owner is gone at once
    kept = garage.store(torch.full((2,), 2.0))
    assert garage.take(kept).tolist() == [2, 2]
