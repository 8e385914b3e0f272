"""The training forward pass of a whole Llama-shaped model, beside PEFT's modules, which it only reads.

Evaluation, generation, saving and merging go on using the modules themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from triton.errors import TritonError

from qlora_trainer.fast.attention import Layout
from qlora_trainer.fast.checkpointing import planned_layers
from qlora_trainer.fast.compilation import compiling_only
from qlora_trainer.fast.cross_entropy import NormedHeadLoss
from qlora_trainer.fast.heads import Heads
from qlora_trainer.fast.layer import Batch, Layer
from qlora_trainer.fast.linears import Group, Linear
from qlora_trainer.fast.offload import Garage
from qlora_trainer.formats import IGNORED
from qlora_vram.coverage import irregularity, longest_regular, of_transformers
from qlorajob.errors import first_line
from qlorajob.plan import Plan

logger = logging.getLogger(__name__)


class NotCoveredError(Exception):
    """This model can't be run here; the message says why."""


class FastDecoder:
    """A causal language model of the Llama shape with LoRA adapters. Only those are trained."""

    def __init__(self, model: Any, plan: Plan, longest: int | None = None) -> None:
        """For rows of at most `longest` tokens (None: of any length). Raises NotCoveredError."""
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = causal.config
        _require_shape(causal, longest)
        body = causal.model
        self.model = model
        self._embed, self._rotary, self._norm = body.embed_tokens, body.rotary_emb, body.norm
        self._head = causal.lm_head.weight
        dtype = self._head.dtype
        checkpointed = planned_layers(plan, len(body.layers))
        self.layers = [
            _read_layer(layer, number, dtype, config, checkpointed=number < checkpointed)
            for number, layer in enumerate(body.layers)
        ]
        groups = [group for layer in self.layers for group in layer.groups]
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        _require_only_adapters(model, self.parameters)
        self._copies = [view for group in groups for view in group.copies]
        for layer in self.layers if plan.cache_weights else ():
            layer.hold_weights()
        size = 0 if plan.cache_weights else max(layer.buffer_size for layer in self.layers)
        self._buffer = torch.empty(size, dtype=dtype, device=self._head.device)
        self._garage = Garage() if plan.offload_checkpoints and checkpointed else None

    def summed_loss(
        self, input_ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """The sum of all counted tokens' cross-entropies, float32. Everything else is [rows, length]."""
        return self._summed_loss(self.layers, input_ids, labels, positions, layout)

    def _summed_loss(
        self, layers: Sequence[Layer], input_ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor,
        layout: Layout,
    ) -> torch.Tensor:  # fmt: skip
        with torch.autocast(input_ids.device.type, enabled=False):
            with torch.no_grad():
                torch._foreach_copy_(self._copies, list[torch.Tensor](self.parameters))
                hidden = self._embed(input_ids).flatten(0, 1)
                batch = self._batch(positions, layout)
            for layer in layers:
                hidden = layer(hidden, batch)
            shifted = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
            return NormedHeadLoss.apply(  # type: ignore[no-any-return, no-untyped-call]
                hidden, self._norm.weight, self._norm.variance_epsilon, self._head, shifted
            )

    def check(self, tokens: int = 64) -> None:
        """Try a few tokens, there and back. Raises NotCoveredError where the loss isn't the one of the modules.

        The adapter changes nothing yet (its second matrices are zero), so neither does dropout.
        """
        device = self._head.device
        ids = (torch.arange(3, 3 + tokens, device=device) % len(self._head))[None]
        positions = torch.arange(tokens, device=device)[None]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if device.type == "cuda":
                self._compile(ids, positions)
            try:
                found = self.summed_loss(ids, ids, positions, Layout(1))
                found.backward()  # type: ignore[no-untyped-call]
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TritonError) as error:
                raise NotCoveredError(f"it fails here: {first_line(error)}") from error
            with torch.no_grad():
                logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, :-1].float()
        for parameter in self.parameters:
            parameter.grad = None
        expected = functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        if not torch.allclose(found.detach(), expected, rtol=0.02):  # nan is close to nothing
            raise NotCoveredError(f"its loss is {float(found.detach()):.3f} where it should be {float(expected):.3f}")
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _compile(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Compile the kernels at one time; one layer has them all. Else each is compiled when it is launched first."""
        try:
            with compiling_only():
                self._summed_loss(self.layers[:1], ids, ids, positions, Layout(1)).backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever it is, launching the kernels tells of it where it matters
            logger.info("kernels are compiled one after the other: %s", error)

    def _batch(self, positions: torch.Tensor, layout: Layout) -> Batch:
        """`positions`: [rows, length].

        The angles are computed here, since a rotary embedding's own forward pass may wait for the GPU, to ask for the
        longest row (longrope). They are those of short rows: others aren't covered.
        """
        angles = positions.flatten()[:, None].float() * self._rotary.original_inv_freq.float()
        cos, sin = (table.mul_(self._rotary.attention_scaling) for table in (angles.cos(), angles.sin()))
        seed = torch.randint(2**31, (1,), device=positions.device)
        return Batch(layout, cos, sin, seed, self._buffer, self._garage)


def _read_layer(layer: Any, number: int, dtype: torch.dtype, config: Any, *, checkpointed: bool) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp

    def group(*modules: nn.Module) -> Group:
        return Group([_read(module) for module in modules], dtype)

    return Layer(
        number=number,
        heads=_read_heads(attention, config),
        eps=layer.input_layernorm.variance_epsilon,
        input_norm=layer.input_layernorm.weight.data,
        middle_norm=layer.post_attention_layernorm.weight.data,
        qkv=group(*_one_or_several(attention, "qkv_proj", "q_proj", "k_proj", "v_proj")),
        out=group(attention.o_proj),
        gate_up=group(*_one_or_several(mlp, "gate_up_proj", "gate_proj", "up_proj")),
        down=group(mlp.down_proj),
        checkpointed=checkpointed,
    )


def _one_or_several(parent: nn.Module, fused: str, *separate: str) -> list[nn.Module]:
    """The linear layers that make one product: one that is all of them (Phi-3's), or each of them."""
    return [getattr(parent, name) for name in ((fused,) if hasattr(parent, fused) else separate)]


def _read_heads(attention: Any, config: Any) -> Heads:
    queries, keys, size = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    if not hasattr(attention, "q_norm"):
        return Heads(queries, keys, size)
    norms = ((attention.q_norm, queries), (attention.k_norm, keys))
    weights = torch.cat([norm.weight.data.expand(count, -1) for norm, count in norms])
    return Heads(queries, keys, size, weights, attention.q_norm.variance_epsilon)


def _read(module: nn.Module) -> Linear:
    linear = Linear.of(module)
    if isinstance(linear, str):
        raise NotCoveredError(linear)
    return linear


def _require_shape(causal: Any, longest: int | None) -> None:
    config = causal.config
    if not of_transformers(config.model_type, type(causal)):
        raise NotCoveredError(f"{config.model_type} isn't of the Llama shape")
    values = config.to_dict()
    irregular, regular = irregularity(values), longest_regular(values)
    if irregular:
        raise NotCoveredError(irregular)
    if regular is not None and (longest is None or longest > regular):
        raise NotCoveredError(f"in rows of more than {regular} tokens attention or positions change")
    if causal.lm_head.bias is not None if hasattr(causal.lm_head, "bias") else True:
        raise NotCoveredError("the output head is more than a matrix")
    if len({causal.lm_head.weight.dtype, causal.model.embed_tokens.weight.dtype, causal.model.norm.weight.dtype}) > 1:
        raise NotCoveredError("embeddings, norms and head differ in type")


def _require_only_adapters(model: Any, parameters: list[Any]) -> None:
    known = {id(parameter) for parameter in parameters}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise NotCoveredError(f"{name} is trained too")
