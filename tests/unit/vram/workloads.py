"""Models and runs for tests of the memory model and the planner."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from qlora_vram.facts import model_facts
from qlora_vram.workload import Shape, Workload
from qlorajob.plan import ModelFacts
from qlorajob.spec import QLoRAJobSpec

SPEC: dict[str, Any] = {
    "model": {"uri": "hf://organisation/model"},
    "dataset": {"uri": "hf://organisation/data"},
    "output": {"uri": "s3://bucket/prefix"},
}


def spec(**sections: dict[str, Any]) -> QLoRAJobSpec:
    """A job with these sections in place of the defaults."""
    return QLoRAJobSpec.model_validate(SPEC | sections)


def workload(facts: ModelFacts, rows: int = 1, length: int = 512, *, checkpointed: int = -1, **fields: Any) -> Workload:
    """A run with every layer checkpointed (or as many as `checkpointed` says) and an adapter on every linear layer."""
    layers = facts.layers if checkpointed < 0 else checkpointed
    cut = {name: fields.pop(name) for name in ("offload", "gpus", "strategy", "cached") if name in fields}
    shape = Shape(rows, layers, **cut)
    return Workload(**({"facts": facts, "shape": shape, "length": length, "targets": facts.linears} | fields))


def llama(
    layers: int, head: int, heads: int, groups: int, inside: int, vocabulary: int, kind: str = "llama"
) -> ModelFacts:
    """A model of one of the families, with heads and widths as asked for."""
    found = model_facts(
        {
            "model_type": kind,
            "num_hidden_layers": layers,
            "hidden_size": head * heads * groups,
            "intermediate_size": inside,
            "num_attention_heads": heads * groups,
            "num_key_value_heads": heads,
            "vocab_size": vocabulary,
            "tie_word_embeddings": False,
        }
    )
    assert found
    return found


FACTS = st.builds(
    llama,
    st.integers(1, 100),
    st.sampled_from([32, 64, 128]),
    st.integers(1, 16),
    st.integers(1, 8),
    st.integers(64, 40_000),
    st.integers(100, 300_000),
    st.sampled_from(["llama", "qwen2", "phi3", "gpt_neox", "gemma2", "falcon"]),
)
"""Models from a million to half a trillion parameters."""
