"""Plans for `gpuClass: cpu`: no GPU is asked for, and host memory is what counts. For tests and tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from qlora_vram import words
from qlora_vram.gpus import CPU, GIB
from qlora_vram.layers import detailed
from qlora_vram.plain import PlainStep
from qlora_vram.requests import Settings, asked
from qlora_vram.workload import Shape, Workload, adapted
from qlorajob.plan import ModelFacts, Plan, Requests
from qlorajob.spec import QLoRAJobSpec

MAX_AUTO_ROWS: Final = 4
"""More rows at once don't train faster on a few cores."""
PROCESS_BYTES: Final = 3 * GIB // 2
"""Python with torch, transformers and datasets loaded."""
LOGIT_BYTES: Final = 20
"""Per token and entry of the vocabulary: float32 logits, log-probabilities, gradients; all tokens' at once."""


def plan_cpu(spec: QLoRAJobSpec, facts: ModelFacts, settings: Settings) -> Plan:
    """There always is one; if nothing fits the administrator's budget, the one that takes the least."""
    cuts = list(_cuts(spec, detailed(facts)))
    fitting = [cut for cut in cuts if _peak(cut) <= settings.cpu_memory_budget_bytes]
    cut = fitting[0] if fitting else min(cuts, key=_peak)
    breakdown = estimate(cut)
    peak = sum(breakdown.values())
    rows = cut.shape.rows
    memory = words.quantity(peak + peak // 4 + GIB // 2)
    disk = words.quantity(2 * GIB + 5 * facts.weight_bytes // 4)
    return Plan(
        gpu_class=CPU,
        gpus=0,
        predicted_peak_bytes=peak,
        breakdown=breakdown,
        micro_batch_size=rows,
        gradient_accumulation=spec.training.global_batch_size // rows,
        checkpointing="full" if cut.shape.checkpointed_layers else "none",
        checkpointed_layers=cut.shape.checkpointed_layers,
        bf16=False,
        requests=Requests(
            cpu=asked(spec.resources.cpu, settings.cpu_cpu_request),
            memory=asked(spec.resources.memory, memory),
            ephemeral_storage=asked(spec.resources.ephemeral_storage, disk),
        ),
        reason=(
            f"gpuClass cpu asks for no GPU: {words.count(facts.parameters)} parameters with "
            f"{words.rows(rows, cut.length)} {words.checkpointing(cut)} take about {words.gigabytes(peak)} of memory"
        ),
    )


def estimate(cut: Workload) -> dict[str, int]:
    """Peak host memory by component, in bytes: weights are read in 16 bit, then held in 4; activations are float32."""
    step = PlainStep(cut, masked=cut.packing or cut.shape.rows > 1)
    layers, kept = cut.facts.layers, cut.kept_layers
    working = max((moment.total for moment in step.in_layer), default=0)
    return {
        "process": PROCESS_BYTES,
        "weights": 3 * max(cut.facts.weight_bytes, 2 * cut.facts.parameters) // 2,
        "adapter": 16 * cut.adapter_parameters,  # with gradients and two optimizer states
        "activations": step.checkpoint * (layers - kept) + step.kept * max(0, kept - 1) + working,
        "logits": cut.tokens * cut.facts.vocabulary * LOGIT_BYTES,
    }


def _peak(cut: Workload) -> int:
    return sum(estimate(cut).values())


def _cuts(spec: QLoRAJobSpec, facts: ModelFacts) -> Iterator[Workload]:
    """Allowed cuts, fastest first: more rows at once before less recomputation."""
    batch, rows = spec.training.global_batch_size, spec.training.micro_batch_size
    numbers = [rows] if isinstance(rows, int) else [n for n in range(MAX_AUTO_ROWS, 0, -1) if batch % n == 0]
    wanted = spec.training.gradient_checkpointing
    checkpointed = ([facts.layers] if wanted else [0]) if isinstance(wanted, bool) else [0, facts.layers]
    for number in numbers:
        for layers in checkpointed:
            yield Workload(
                facts=facts,
                shape=Shape(number, layers),
                length=spec.training.max_sequence_length,
                rank=spec.lora.rank,
                targets=adapted(spec, facts),
                dropout=spec.lora.dropout > 0,
                packing=spec.training.packing,
                accumulation=batch // number,
                compute_bytes=4,
                autocast=False,
            )
