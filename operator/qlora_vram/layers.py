"""What a decoder layer is made of, as far as memory and time go: its widths, its norms, its linear layers by role.

Layers are taken for equal, so numbers of a model whose layers differ are averages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qlora_vram.architectures import FAMILIES
from qlorajob.plan import LinearLayers, ModelFacts

Role = Literal["qkv", "out", "up", "down"]
"""What a linear layer does: into attention, out of it, into the feed-forward part, out of that."""

NAMES: dict[str, Role] = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "qkv_proj": "qkv", "query_key_value": "qkv", "c_attn": "qkv",
    "Wqkv": "qkv", "q_a_proj": "qkv", "q_b_proj": "qkv", "kv_a_proj_with_mqa": "qkv", "kv_b_proj": "qkv",
    "o_proj": "out", "out_proj": "out", "dense": "out",
    "gate_proj": "up", "up_proj": "up", "gate_up_proj": "up", "dense_h_to_4h": "up", "fc1": "up", "fc_in": "up",
    "c_fc": "up", "w1": "up", "w3": "up",
    "down_proj": "down", "dense_4h_to_h": "down", "fc2": "down", "fc_out": "down", "w2": "down",
}  # fmt: skip
"""Usual names; where a name is none of them (or means two things, as c_proj does), the shape decides."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Widths are numbers per token."""

    hidden: int
    queries: int
    """Query heads · head size."""
    keys: int
    """Key heads · head size; values likewise."""
    heads: int
    inside: int
    """Inside the feed-forward part, of all the experts that a token visits."""
    gated: bool
    """The feed-forward part multiplies its activation with a second product (SwiGLU and its like)."""
    fused_qkv: bool
    """Queries, keys and values are slices of one product."""
    norms: int
    """Norms as wide as the residual stream."""
    head_norms: bool
    """Queries and keys are normed too."""
    layer_norm: bool
    """Norms are torch's LayerNorm, which autocast runs in float32, rather than RMSNorms."""
    shared_input: bool
    """Attention and feed-forward part read the same residual stream (a parallel residual)."""

    joined_heads: bool
    """Queries are joined from a rotated and a plain part, head by head, and so change their layout in memory."""

    whole_scores: bool
    """Attention computes a score for each pair of tokens and keeps it: the family has no fused kernel."""

    experts: bool
    """A mixture of experts in stacked tensors."""

    @property
    def grouped(self) -> bool:
        """Several queries share a key."""
        return self.keys < self.queries

    @classmethod
    def of(cls, facts: ModelFacts) -> Layer:
        """The layer of a model. Families that `architectures` doesn't describe are taken to be like Llama."""
        family = FAMILIES.get(facts.model_type)
        norms = family.norms if family else ()
        # Conditions such as `!rmsnorm` count as false: today's checkpoints of such families have RMSNorms.
        wide = [norm for norm in norms if norm.width == "hidden" and norm.when is not False]
        up = [linear for linear in facts.linears if role(linear, facts) == "up"]
        width_up = sum(linear.outputs * linear.count for linear in up) / max(1, facts.layers)
        return cls(
            hidden=facts.hidden_size,
            queries=facts.attention_heads * facts.head_size,
            keys=facts.key_value_heads * facts.head_size,
            heads=facts.attention_heads,
            inside=facts.intermediate_size,
            # Experts in stacked tensors are gated in every family that transformers has.
            gated=bool(facts.expert_parameters) or width_up >= 1.9 * facts.intermediate_size,
            fused_qkv=any(
                role(linear, facts) == "qkv" and linear.outputs > facts.attention_heads * facts.head_size
                for linear in facts.linears
            ),
            norms=len(wide) or 2,
            head_norms=any(norm.width in ("head", "queries") and norm.when is True for norm in norms),
            layer_norm=any(norm.bias is True for norm in wide),
            shared_input=facts.model_type in PARALLEL,
            joined_heads=facts.model_type in PARTLY_ROTATED,
            whole_scores=facts.model_type in WITHOUT_SDPA,
            experts=facts.expert_parameters > 0,
        )


PARALLEL = frozenset({"gpt_neox", "gptj", "falcon", "phi", "cohere", "cohere2"})
"""Families with a parallel residual: both parts read one stream."""
PARTLY_ROTATED = frozenset({"gpt_neox", "phi", "phi3", "glm", "glm4", "stablelm", "chatglm"})
"""Families that rotate a part of each head and join it with the rest."""
WITHOUT_SDPA = frozenset({"bloom", "codegen", "gpt_neo", "gpt_oss", "gptj", "internlm2", "mpt"})
"""Families for which transformers (or their own code) has nothing but matrix products and a softmax."""


def role(linear: LinearLayers, facts: ModelFacts) -> Role:
    """What a linear layer does, by its name or else by its shape."""
    if linear.name in NAMES:
        return NAMES[linear.name]
    if linear.outputs == facts.hidden_size:
        return "down" if linear.inputs > facts.hidden_size else "out"
    return "up" if linear.outputs >= facts.intermediate_size > 0 else "qkv"


def by_role(linears: Iterable[LinearLayers], facts: ModelFacts) -> dict[Role, tuple[LinearLayers, ...]]:
    """Linear layers of each role."""
    found: dict[Role, tuple[LinearLayers, ...]] = {"qkv": (), "out": (), "up": (), "down": ()}
    for linear in linears:
        found[role(linear, facts)] += (linear,)
    return found


def detailed(facts: ModelFacts) -> ModelFacts:
    """The facts, with what they leave out taken to be as in a Llama of the same size.

    An operator of another version, or a model from remote code, may have told no more than parameters, layers, width
    and vocabulary.
    """
    if facts.linears or not (facts.layers and facts.hidden_size):
        return facts
    hidden, layers = facts.hidden_size, facts.layers
    tokens = min(facts.vocabulary * hidden, facts.parameters // 2)
    outer = 2 * tokens if facts.parameters >= 4 * tokens else tokens  # small models share embeddings and head
    inside = max(1, (facts.parameters - outer - 4 * layers * hidden * hidden) // (3 * layers * hidden))
    linears = tuple(
        LinearLayers(name=name, inputs=inputs, outputs=outputs, count=layers)
        for name, inputs, outputs in (
            *((name, hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
            *((name, hidden, inside) for name in ("gate_proj", "up_proj")),
            ("down_proj", inside, hidden),
        )
    )
    heads = max(1, hidden // 128)
    return facts.model_copy(
        update={
            "linears": linears,
            "embedding_parameters": tokens,
            "head_parameters": outer - tokens,
            "other_parameters": (2 * layers + 1) * hidden,
            "intermediate_size": inside,
            "attention_heads": heads,
            "key_value_heads": heads,
            "head_size": max(1, hidden // heads),
        }
    )
