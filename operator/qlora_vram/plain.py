"""Memory of a step through transformers' and PEFT's own modules, one operation at a time.

Follows what autograd saves there (transformers 5.17, PEFT 0.21, bitsandbytes 0.50, TRL 1.15, on CUDA):
- A frozen 4-bit product saves nothing (`MatMul4Bit` keeps the packed weight alone), nor does a product with a bias.
- LoRA's A saves its input in the type it computes in: shared between layers that read the same tensor, but a copy each
  where dropout comes first (with a mask of a byte) or where autocast rounds it.
- RMSNorm computes in float32 and saves that copy; LayerNorm runs in float32 under autocast, and from then on the whole
  residual stream is float32, and with it what the layers' products return.
- SDPA saves q, k, v, its result and a float32 for each head. With a mask it takes the memory-efficient kernel, which
  repeats grouped keys and values, and keeps the mask in 16 bit in each layer. Families without SDPA keep all scores.
- SwiGLU saves gate, activation and up; a plain GELU its input.
- Autocast applies to the product inside `gemm_4bit`. Where its type isn't the compute type, the dequantized weight is
  rounded into a second tensor, forward and backward; and what is summed of both types is float32.
tests/unit/vram/test_memory.py runs these modules and counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from qlora_vram.activations import FLASH_WORKSPACE, Moment, adapted_per_layer
from qlora_vram.layers import Layer, Role, by_role
from qlora_vram.workload import Workload
from qlorajob.plan import LinearLayers

LOSS_TOKENS: Final = 4096
"""TRL's `TOKEN_CHUNK_SIZE`: tokens whose logits exist at once …"""
LOSS_COLUMNS: Final = 32768
"""… and its `_CHUNKED_LOGPROB_CHUNK_SIZE`: how many of each, whatever the vocabulary is."""
WHOLE_LOGITS: Final = 14
"""Bytes of a logit where a model's own code makes them all: in 16 bit, in float32, as its loss keeps them, their
gradient."""
VISITED_EXPERTS: Final = 8
"""No usual mixture sends a token to more experts; each visit has an input and a result of its own."""
GELU_COPIES: Final = {"gpt2": 4, "gptj": 4, "phi": 4, "codegen": 4}
"""Families with the tanh approximation written out in Python, whose parts autograd saves one by one."""


@dataclass(frozen=True)
class PlainStep:
    """Implements `activations.Step`. Sizes of tensors are in bytes, for a whole micro batch."""

    workload: Workload
    masked: bool
    """Attention gets an explicit mask: of documents in packed rows, or of padding."""

    @cached_property
    def _layer(self) -> Layer:
        return self.workload.layer

    @cached_property
    def _narrow(self) -> int:
        """Bytes of a number that LoRA and attention compute in."""
        return 2 if self.workload.autocast else 4

    @cached_property
    def _wide(self) -> int:
        """Bytes of a number in the residual stream, and in the results of products that read a norm."""
        widened = self.workload.recast or (self._layer.layer_norm and self.workload.autocast)
        return 4 if widened else self.workload.compute_bytes

    @cached_property
    def _attending(self) -> int:
        """Bytes of a number in attention."""
        return 2 if self.workload.autocast else self.workload.compute_bytes

    def _size(self, per_token: float) -> int:
        return int(self.workload.tokens * per_token)

    # What is kept

    @property
    def standing(self) -> dict[str, int]:
        """What packed rows' mask was built from: positions, compared as 64-bit integers; nothing else fits into it.

        No buffer for weights: each is dequantized into a tensor of its own. One exists at a time, but the allocator
        comes to hold a block for each size.
        """
        weights = sorted({self._dequantized(role) for role in self._linears})
        blocks = {"slack": sum(weights[:-1])}
        if not self.workload.packing:
            return blocks
        return {**blocks, "mask": 8 * self.workload.tokens**2 // self.workload.shape.rows}

    @cached_property
    def kept(self) -> int:
        """What autograd saves in one layer."""
        return self._size(self._kept_before_mlp + self._kept_in_mlp) + self._pairs + self._rounded_adapter

    @cached_property
    def checkpoint(self) -> int:
        """The layer's input."""
        return self._size(self._wide * self._layer.hidden)

    @property
    def offloaded(self) -> int:
        """The same."""
        return self.checkpoint

    @cached_property
    def _kept_before_mlp(self) -> float:
        layer, adapted = self._layer, adapted_per_layer(self.workload)
        norms = max(1, layer.norms // 2) * 4 * layer.hidden
        if layer.head_norms:
            norms += 4 * (layer.queries + layer.keys)
        inputs = self._inputs(layer.hidden, adapted["qkv"], self._wide)
        # Without a copy of its own, LoRA's A after attention saves attention's result. That is there already, unless it
        # had to be laid out anew: FlashAttention gives it the layout of the queries.
        after = self._inputs(layer.queries, adapted["out"], self._attending)
        if self._shares(self._attending) and (self.masked or not layer.joined_heads):
            after = 0.0
        low = self._narrow * self.workload.rank * (adapted["qkv"] + adapted["out"])
        return norms + inputs + self._kept_by_attention + after + low

    @cached_property
    def _kept_by_attention(self) -> float:
        layer, size = self._layer, self._attending
        keys = layer.queries if self.masked else layer.keys
        values = keys
        if layer.fused_qkv and self._wide == size and not (self.masked and layer.grouped):
            values = layer.queries + 2 * layer.keys  # a slice keeps the whole product
        return size * (2 * layer.queries + keys + values) + 4 * layer.heads

    @cached_property
    def _kept_in_mlp(self) -> float:
        layer, adapted, wide = self._layer, adapted_per_layer(self.workload), self._wide
        copies = 3 if layer.gated else GELU_COPIES.get(self.workload.facts.model_type, 1)
        low = self._narrow * self.workload.rank * (adapted["up"] + adapted["down"])
        visited = 2 * VISITED_EXPERTS * wide * layer.hidden if layer.experts else 0
        return self._kept_at_up + copies * wide * layer.inside + visited + self._kept_before_down + low

    @cached_property
    def _kept_at_up(self) -> float:
        """The second norm, and its result."""
        layer = self._layer
        second = layer.norms - max(1, layer.norms // 2)
        norms = 0 if layer.shared_input and layer.layer_norm else second * 4 * layer.hidden
        return norms + self._inputs(layer.hidden, adapted_per_layer(self.workload)["up"], self._wide)

    @cached_property
    def _kept_before_down(self) -> float:
        return self._inputs(self._layer.inside, adapted_per_layer(self.workload)["down"], self._wide)

    def _shares(self, size: int) -> bool:
        """LoRA's A saves the very tensor that it is given, of `size` bytes a number."""
        return not self.workload.dropout and size == self._narrow

    def _inputs(self, width: int, adapters: float, size: int) -> float:
        """Bytes a token that `adapters` layers with one input of `size` bytes a number save of it."""
        if self._shares(size):
            return self._narrow * width * min(1.0, adapters)
        return (self._narrow + self.workload.dropout) * width * adapters

    @cached_property
    def _pairs(self) -> int:
        """What is kept for each pair of tokens of a row: the mask as attention takes it, or each head's score.

        A score is kept twice, in float32 behind the softmax and in attention's own type.
        """
        pairs = self.workload.tokens**2 // self.workload.shape.rows
        if self._layer.whole_scores:
            return (4 + self._attending) * self._layer.heads * pairs
        return self._attending * pairs if self.masked else 0

    @cached_property
    def _rounded_adapter(self) -> int:
        """Copies that autocast makes of one layer's adapter, which backward reads again."""
        if not self.workload.autocast:
            return 0
        return self._narrow * self.workload.adapter_parameters // max(1, self.workload.facts.layers)

    # Moments

    @cached_property
    def in_layer(self) -> tuple[Moment, ...]:
        """Recomputation, then backward from the last product to attention."""
        layer, wide = self._layer, self._wide
        stream, inside = wide * layer.hidden, wide * layer.inside
        down, up = self._dequantized("down"), self._dequantized("up")
        kept = self._kept_before_mlp + self._kept_in_mlp
        before_down = kept - self._kept_before_down + stream
        rounded = inside if self.workload.dropout and wide != self._narrow else 0
        # Its result, and its input; a gated one's fits into the streams counted here, of which it has fewer.
        rounded_product = layer.hidden + (0 if layer.gated else layer.inside)
        factors = (2 if layer.gated else 1) * inside
        product = self._widest_up * wide
        normed = 0 if self._shares(wide) else stream
        at_up = self._kept_before_mlp + self._kept_at_up + factors + stream
        before_up = self._kept_before_mlp + self._kept_at_up + 3 * stream
        return (
            # Recomputed through the widest first product: what the weight gives, what the adapter gives, and that
            # times its scale; beside them the residual stream before and behind attention, and its gradient.
            self._moment(before_up + 3 * product),
            # Recomputed up to the last product: its result, the residual stream and its gradient beside it, and the
            # norm's result where LoRA's A didn't save that.
            self._moment(before_down + inside + 2 * stream + 2 * normed + self._recast(rounded_product), down),
            self._moment(kept + (0 if self._keeps_product else inside) + rounded + 3 * stream + normed),
            # Backward through it: the gradients from the adapter and from the weight, then their sum, then those of
            # both factors.
            self._moment(before_down + 2 * inside, down),
            self._moment(before_down + 3 * inside),
            # Backward through the first products.
            self._moment(at_up + 2 * stream, up),
            self._moment(at_up + 2 * product),
            # RMSNorm's steps in float32, then attention.
            self._moment(self._kept_before_mlp + (1 + 5) * 4 * layer.hidden + 2 * stream),
            self._moment(self._kept_before_mlp + self._attention_gradients + stream + self._score_gradients),
        )

    @cached_property
    def _keeps_product(self) -> bool:
        """LoRA's A before the last product saves the very tensor."""
        return self._shares(self._wide) and adapted_per_layer(self.workload)["down"] > 0

    @cached_property
    def _widest_up(self) -> int:
        """Outputs of the widest product into the feed-forward part."""
        return max((linear.outputs for linear in self._linears["up"]), default=0)

    @cached_property
    def _attention_gradients(self) -> float:
        layer, size = self._layer, self._attending
        grouped = 2 * size * layer.queries if layer.grouped else 0  # of keys and values before they are added up
        workspace = FLASH_WORKSPACE * layer.queries
        return size * (2 * layer.queries + 2 * layer.keys) + grouped + workspace

    @cached_property
    def _score_gradients(self) -> float:
        """Two gradients of a float32 score at a time, a token."""
        return 2 * 4 * self._layer.heads * self.workload.tokens / self.workload.shape.rows * self._layer.whole_scores

    @cached_property
    def in_loss(self) -> tuple[Moment, ...]:
        """TRL's fused head, or the model's own, forward and backward, and the last norm."""
        hidden, tokens, size = self._layer.hidden, self.workload.tokens, self.workload.compute_bytes
        if self.workload.facts.whole_logits:
            logits = self._size(WHOLE_LOGITS * self.workload.facts.vocabulary)
            return (Moment(working=self._size((4 + self._wide) * hidden), loss=logits),)
        tile = min(tokens, LOSS_TOKENS) * LOSS_COLUMNS * (2 if self.workload.autocast else size)
        norm, selected = self._size(4 * hidden), self._size(self._wide * hidden)
        copies = self._rounded_adapter * self.workload.shape.checkpointed_layers  # autocast drops them after forward
        columns, head = self.workload.facts.vocabulary, int(self._recast(hidden))
        rounded = head * min(columns, LOSS_COLUMNS)
        both = head * min(columns, 2 * LOSS_COLUMNS)  # backward, the last columns' copy is there as the next are made
        return (
            Moment(working=norm + 2 * selected + copies, loss=tile + rounded),
            Moment(working=norm + 2 * selected + self._size(4 * hidden), loss=tile + both),  # TRL adds up in float32
            Moment(working=norm + 2 * selected + self._size(3 * 4 * hidden)),  # backward through the last norm
        )

    def _moment(self, per_token: float, dequantization: int = 0) -> Moment:
        working = self._size(per_token) + self._pairs + self._rounded_adapter
        return Moment(working=working, dequantization=dequantization)

    def _recast(self, numbers: float) -> float:
        """Bytes of so many numbers' copies in autocast's type, where that isn't the one they are in."""
        return self._narrow * numbers if self.workload.recast else 0

    def _dequantized(self, name: Role) -> int:
        """bitsandbytes' buffer for a weight, and the float32 block constants behind double quantization."""
        numbers = max((linear.inputs * linear.outputs for linear in self._linears[name]), default=0)
        constants = 4 * -(-numbers // 64) if self.workload.double_quantization else 0
        return self.workload.compute_bytes * numbers + constants + int(self._recast(numbers))

    @cached_property
    def _linears(self) -> dict[Role, tuple[LinearLayers, ...]]:
        return by_role(self.workload.facts.linears, self.workload.facts)
