"""Gradient checkpointing of as many decoder layers as the plan says, optionally with the checkpoints in host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_trainer.fast.offload import Garage, Parked
from qlorajob.plan import Plan


def planned_layers(plan: Plan, layers: int) -> int:
    """How many of a model's layers the plan checkpoints."""
    return {"none": 0, "partial": min(plan.checkpointed_layers, layers), "full": layers}[plan.checkpointing]


def checkpoint_layers(model: nn.Module, plan: Plan) -> str | None:
    """Let the first layers of any transformers decoder compute their forward pass again in the backward pass.

    Returns in which way that is less than planned, or None. Models from remote code may have no layers that can be told
    apart: theirs are checkpointed all or not at all, by the model's own switch.
    """
    layers = decoder_layers(model)
    if not layers:
        if plan.checkpointing == "none":
            return None
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        if plan.checkpointing == "full" and not plan.offload_checkpoints:
            return None
        return "every layer is checkpointed, on the GPU: this model's layers can't be told apart"
    count = planned_layers(plan, len(layers))
    run_again = _offloading(Garage()) if plan.offload_checkpoints else _run_again
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count
        layer._gradient_checkpointing_func = run_again
    return None


def decoder_layers(model: nn.Module) -> list[Any]:
    """The model's layers that know how to be checkpointed, in their order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _run_again(function: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False)


def _offloading(garage: Garage) -> Callable[..., Any]:
    """Checkpointing whose inputs wait in host memory. Only they pass these hooks: checkpoint's own are inside."""

    def pack(tensor: Any) -> Any:
        return garage.store(tensor) if tensor.is_floating_point() and tensor.numel() else tensor

    def unpack(stored: Any) -> Any:
        return garage.take(stored) if isinstance(stored, Parked) else stored

    def run_again(function: Callable[..., Any], *inputs: Any) -> Any:
        with saved_tensors_hooks(pack, unpack):
            return _run_again(function, *inputs)

    return run_again
