"""A plan for people: what the memory goes to, which classes would do, and why this one."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.questions import Answer, ClassAnswer
from qlora_vram import words
from qlora_vram.outcome import DoesNotFit
from qlora_vram.workload import Workload
from qlorajob.plan import Plan

BAR = 32
NAMES = {
    "quantizedWeights": "weights in 4 bit",
    "weights16Bit": "weights in 16 bit",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "checkpoints": "checkpoints",
    "activations": "kept activations",
    "layer": "one layer at work",
    "loss": "loss",
    "weightCache": "their cache in 16 bit",
    "dequantization": "dequantization",
    "mask": "attention mask",
    "communication": "communication",
    "slack": "allocator",
    "context": "CUDA",
    "process": "process",
    "weights": "weights",
    "logits": "logits",
}
"""Components in words."""


def show(answer: Answer, console: Console) -> None:
    """Print it."""
    console.print(Group(*_parts(answer)))


def _parts(answer: Answer) -> list[RenderableType]:
    outcome = answer.outcome
    if isinstance(outcome, DoesNotFit):
        reason = Text(f"{outcome.reason}: spec.{outcome.field}: {outcome.message}", style="red")
        return [reason, *_classes(answer.classes, None)]
    return [_components(outcome), Text(), *_classes(answer.classes, outcome), _settings(outcome), Text(outcome.reason)]


def _components(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    widest = max(plan.breakdown.values())
    for name, size in plan.breakdown.items():
        table.add_row(NAMES.get(name, name), Text(words.gigabytes(size), justify="right"), _bar(size, widest))
    table.add_row(Text("predicted peak", style="bold"), Text(words.gigabytes(plan.predicted_peak_bytes), style="bold"))
    return table


def _bar(size: int, widest: int) -> Text:
    return Text("█" * max(1, round(BAR * size / widest)), style="cyan")


def _classes(classes: tuple[ClassAnswer, ...], chosen: Plan | None) -> list[RenderableType]:
    if not classes:
        return []
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title, right in (
        ("", False),
        ("class", False),
        ("usable", True),
        ("needs", True),
        ("tok/s", True),
        ("how", False),
    ):
        # In a narrow terminal the last column gives way, and no number loses a digit.
        table.add_column(title, justify="right" if right else "left", no_wrap=title != "how")
    for each in classes:
        is_chosen = chosen is not None and each.gpu.name == chosen.gpu_class
        table.add_row(
            "▶" if is_chosen else "✓" if each.cut else "✗",
            each.gpu.name,
            words.gigabytes(each.usable),
            words.gigabytes(each.needed),
            f"{each.speed:,.0f}" if each.cut else "",
            _how(each.cut) if each.cut else "",
            style="bold" if is_chosen else "" if each.cut else "dim",
        )
    return [table, Text()]


def _how(cut: Workload) -> str:
    layers, again = cut.facts.layers, cut.facts.layers - cut.kept_layers
    recomputed = "" if not again else ", all layers again" if again == layers else f", {again} of {layers} layers again"
    where = ", from the host" if cut.shape.offload else ""
    return f"{cut.shape.rows} × {cut.accumulation}{recomputed}{where}{', weights cached' if cut.shape.cached else ''}"


def _settings(plan: Plan) -> Table:
    requests: Mapping[str, str] = plan.requests.to_wire()
    rows = {
        "GPU": f"{plan.gpus} × {plan.gpu_class}" if plan.gpus else "none",
        "micro batch": f"{plan.micro_batch_size}, accumulated {plan.gradient_accumulation} times",
        "checkpointing": plan.checkpointing
        + (f" ({plan.checkpointed_layers} layers)" if plan.checkpointed_layers else ""),
        "requests": ", ".join(f"{name} {value}" for name, value in requests.items()),
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), value)
    return table
