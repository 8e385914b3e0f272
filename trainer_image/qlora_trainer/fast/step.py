"""A whole micro step (forward and backward) on the fast path; as one CUDA graph where launching it costs more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_trainer.batches import DOCUMENT_ENDS, LONGEST_DOCUMENT
from qlora_trainer.fast.attention import Layout
from qlora_trainer.fast.decoder import FastDecoder, NotCoveredError
from qlora_trainer.hardware import Hardware
from qlora_trainer.shapes import Shapes
from qlorajob.plan import Plan

MAX_GRAPHS = 8
"""Shapes that get a graph. Each keeps its activations' memory, which they share."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a micro step reads: tensors on the device, and what its shape depends on."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    items: torch.Tensor
    """Tokens that the loss is the mean of, over the whole step: float32 scalar."""
    ends: torch.Tensor | None
    longest: int

    @classmethod
    def of(cls, batch: dict[str, Any], items: torch.Tensor | int | None) -> Inputs:
        """From a collator's batch on the device."""
        ids, labels = batch["input_ids"], batch["labels"]
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        if items is None:
            items = (labels[:, 1:] >= 0).sum()
        wide = torch.as_tensor(items, device=ids.device).to(torch.float32).clamp(min=1)
        return cls(ids, labels, positions, wide, batch.get(DOCUMENT_ENDS), batch.get(LONGEST_DOCUMENT, 0))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that are there."""
        found = (self.input_ids, self.labels, self.positions, self.items, self.ends)
        return tuple(tensor for tensor in found if tensor is not None)

    @property
    def shape(self) -> tuple[Any, ...]:
        """What a graph is made for."""
        return (*self.input_ids.shape, None if self.ends is None else len(self.ends), self.longest)

    def rounded(self) -> Inputs:
        """The same with empty documents at the end, so that fewer shapes come up."""
        if self.ends is None:
            return self
        room = max(16, 1 << len(self.ends).bit_length())
        ends = self.ends.new_full((room,), self.input_ids.numel())
        ends[: len(self.ends)] = self.ends
        return replace(self, ends=ends, longest=self.input_ids.shape[1])

    def copied(self) -> Inputs:
        """The same in memory of its own."""
        ends = None if self.ends is None else self.ends.clone()
        return Inputs(
            self.input_ids.clone(), self.labels.clone(), self.positions.contiguous().clone(), self.items.clone(), ends,
            self.longest,
        )  # fmt: skip


def start(
    model: Any,
    plan: Plan,
    hardware: Hardware,
    backward: Callable[[torch.Tensor], None],
    shapes: Shapes,
    longest: int,
) -> MicroStep | None:
    """The fast path for a model, in rows of at most `longest` tokens; as graphs where micro batches are replayable.

    None, with the reason among the degradations, where it can't be taken.
    """
    try:
        decoder = _decoder(model, plan, hardware, longest)
    except NotCoveredError as error:
        hardware.degrade(f"the layers run one operation at a time: {error}")
        return None
    # Gradients that are scaled, or checkpoints that leave the device, change from step to step.
    graphs = shapes.replayable and hardware.precision != "fp16" and not plan.offload_checkpoints
    return MicroStep(decoder, backward, graphs=graphs)


def _decoder(model: Any, plan: Plan, hardware: Hardware, longest: int) -> FastDecoder:
    if torch.cuda.get_device_capability()[0] < 8:
        raise NotCoveredError("its attention needs a GPU of compute capability 8 or more")
    if plan.gpus > 1:
        raise NotCoveredError("it knows one GPU")
    if not hardware.types.narrow:
        raise NotCoveredError("quantization.computeDtype and training.precision aren't one 16-bit type")
    decoder = FastDecoder(model, plan, longest)
    decoder.check()
    return decoder


class MicroStep:
    """Adds a micro batch's gradients to the parameters' `.grad`, and returns its part of the mean loss."""

    def __init__(self, decoder: FastDecoder, backward: Callable[[torch.Tensor], None], *, graphs: bool) -> None:
        self._decoder, self._backward = decoder, backward
        self._graphs: dict[tuple[Any, ...], _Graph] | None = {} if graphs else None
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._pool: Any = None
        self._grads: list[torch.Tensor] = []

    def __call__(self, batch: dict[str, Any], items: torch.Tensor | int | None) -> torch.Tensor:
        """One micro step. `items` as transformers counts them: the tokens of all micro batches of the step."""
        inputs = Inputs.of(batch, items)
        if self._graphs is None:
            return self._run(inputs)
        inputs = inputs.rounded()
        graph = self._graphs.get(inputs.shape)
        if graph is None:
            self._seen[inputs.shape] += 1
            if self._seen[inputs.shape] < 2 or len(self._graphs) == MAX_GRAPHS:
                return self._run(inputs)  # which also compiles the kernels
            graph = self._graphs[inputs.shape] = self._capture(inputs)
        self._use_own_gradients()
        return graph(inputs)

    def _run(self, inputs: Inputs) -> torch.Tensor:
        layout = Layout(len(inputs.input_ids), inputs.ends, inputs.longest)
        loss = self._decoder.summed_loss(inputs.input_ids, inputs.labels, inputs.positions, layout) / inputs.items
        self._backward(loss)
        return loss.detach()

    def _capture(self, inputs: Inputs) -> _Graph:
        """Record a micro step. Recording runs nothing; its gradients' addresses stay what they are from here on."""
        if not self._grads:
            found = [(parameter, parameter.grad) for parameter in self._decoder.parameters]
            # What earlier micro batches of this step have left goes on being used: a copy would be a peak of its own.
            self._grads = [torch.zeros_like(parameter) if grad is None else grad for parameter, grad in found]
            self._pool = torch.cuda.graph_pool_handle()
        self._use_own_gradients()
        own, graph = inputs.copied(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graphs' memory is apart from what eager steps left behind
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._run(own)
        return _Graph(graph, own, loss)

    def _use_own_gradients(self) -> None:
        """Let `.grad` be the tensors that the graphs add to, with what was there (transformers sets it to None)."""
        parameters = self._decoder.parameters
        if parameters[0].grad is self._grads[0]:
            return
        if parameters[0].grad is None:
            torch._foreach_zero_(self._grads)
        else:
            torch._foreach_copy_(self._grads, [p.grad for p in parameters if p.grad is not None])
        for parameter, grad in zip(parameters, self._grads, strict=True):
            parameter.grad = grad


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: Any
    inputs: Inputs
    loss: torch.Tensor

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        torch._foreach_copy_(list(self.inputs.tensors), list(inputs.tensors))
        self.graph.replay()
        return self.loss.clone()
