"""How a family of models is built, as data: which layers there are, how wide they are, what config.json may leave out.

A width is a name, or a sum of names such as `queries+keys+keys` for a fused projection. Names are the numbers of
config.json and those that follow from them (see `qlora_vram.facts`): hidden, queries, keys, ffn, head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Condition = bool | str
"""Whether something is there: always, never, or as a switch of config.json says (`!` in front turns it round)."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer. Its weight can be quantized; its bias can't."""

    path: str
    """Module path below the decoder layer (or below the model), such as self_attn.q_proj."""
    inputs: str
    outputs: str
    bias: Condition = False
    when: Condition = True

    @property
    def name(self) -> str:
        """What LoRA calls it: the last part of its path."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm's scale, or any other parameter that is a vector."""

    width: str
    bias: Condition = False
    when: Condition = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the feed-forward part.

    transformers holds the experts of a layer as two stacked tensors (gate and up together, and down) and the router as
    a bare parameter. bitsandbytes replaces modules, so it quantizes neither.
    """

    width: str = "moe_intermediate_size"
    """Width inside one expert."""
    bias: Condition = False
    """Experts and router have biases."""
    shared: tuple[Linear, ...] = ()
    """Linear layers that every token visits as well."""
    shared_width: str = ""
    """Width inside those."""
    dense_first: str = ""
    """Key of config.json: how many layers, from the first, have no experts."""
    step: str = ""
    """Key: only every n-th layer has experts."""
    dense: str = ""
    """Key: a list of layers without experts."""


Values = dict[str, Any]
"""config.json under transformers' usual names, with the family's defaults filled in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Everything that tells one model type from another, as far as parameters go."""

    defaults: Mapping[str, Any]
    """Values of transformers' configuration class for what config.json leaves out."""
    aliases: Mapping[str, str]
    """Usual key → the family's own."""
    attention: tuple[Linear, ...]
    feed_forward: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    """Of each decoder layer."""
    outer_norms: tuple[Norm, ...]
    """Once in a model: behind the last layer, or behind the embeddings."""
    layers: str = "model.layers"
    """Module path of the decoder layers."""
    experts: Experts | None = None
    outer_linears: tuple[Linear, ...] = ()
    """Linear layers outside of the decoder layers, other than the head."""
    embedding: str = "hidden"
    """Width of the token embeddings, and what the head reads."""
    positions: str = ""
    """Rows of learned position embeddings."""
    head: str = "lm_head"
    """Module path of the output head."""
    head_bias: Condition = False
    lora_default: tuple[str, ...] = ()
    """PEFT's default targets; none where PEFT has none."""
    remote_code: bool = False
    """Comes with Python code of its own: transformers has no class for it."""
    whole_logits: bool = False
    """The loss is made from all logits at once, since TRL's fused head doesn't know what the body returns."""
    packs: bool = True
    """Documents in one row don't see each other: transformers tells them apart by their positions."""
    needs: tuple[str, ...] = ()
    """Keys without which a config of this type is of another kind."""
    refuses: tuple[str, ...] = ()
    """Switches that, when set, add parts that this description doesn't have."""
    complete: Callable[[Values], Mapping[str, Any]] | None = None
    """Values that follow from others in this family's own way."""
