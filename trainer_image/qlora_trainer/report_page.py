"""report.html: the report as one page that asks for nothing else. It follows from report.json alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from qlora_trainer.charts import Bar, Chart, Point, Series, bars, line_chart
from qlora_trainer.uris import short_name
from qlorajob.manifest import REPORT, REPORT_PAGE

TEMPLATE = "report.html.j2"
MIDDLE = "·"

DROPPED = {
    "filter": "filtered out",
    "empty": "nothing to learn",
    "cut": "nothing left after the cut",
    "duplicate": "duplicate",
}
"""Why a row isn't used (qlorajob.status.DataSummary), in words."""
PHASES = {
    "imports": "start",
    "download": "download",
    "data": "reading the data",
    "load": "loading the model",
    "setup": "set-up",
    "base": "asking the base model",
    "train": "training",
    "evaluation": "asking the tuned model",
    "upload": "upload",
}
"""Laps of the recipe's clock, in words."""

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """One of the numbers at the top."""

    name: str
    value: str
    note: str = ""
    before: str = ""
    """What it was at first."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A line of a table."""

    name: str
    value: str
    code: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """Predicted and measured memory, each as a share of the longest bar."""

    predicted: Bar
    parts: tuple[Bar, ...]
    measured: Bar | None
    device: Bar | None


def report_files(report: Json) -> dict[str, bytes]:
    """The report as the files that go into storage: for programs, and for people."""
    report = _finite(report)
    return {
        REPORT: json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False).encode(),
        REPORT_PAGE: render(report).encode(),
    }


def _finite(value: Any) -> Any:
    """The value with null for what isn't a number: JSON knows neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(report: Json) -> str:
    """The page. Everything that came from outside is escaped."""
    return _template().render(
        report=report,
        model=short_name(report["provenance"]["modelUri"]),
        dataset=short_name(report["provenance"]["datasetUri"]),
        figures=_figures(report),
        loss_chart=_loss_chart(report["loss"]),
        small_charts=_small_charts(report["loss"]["curve"]),
        rows=_rows(report["data"]),
        lengths=bars(report["data"].get("lengths") or {}),
        data_facts=_data_facts(report["data"]),
        memory=_memory(report["memory"]),
        phases=_phases(report["seconds"]),
        run_facts=_run_facts(report),
        provenance=_provenance(report),
        spec=json.dumps(report["provenance"]["spec"], indent=2, ensure_ascii=False),
        duration=duration,
        size=size,
        short=short,
    )


@cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template(TEMPLATE)


def _figures(report: Json) -> list[Figure]:
    loss, memory, throughput, training = (report[part] for part in ("loss", "memory", "throughput", "training"))
    figures = [
        Figure("Training loss", _number(loss["last"]), f"after {training['steps']:,} steps", _number(loss["first"]))
    ]
    if loss["evalTuned"] is not None:
        perplexity = f"perplexity {_number(loss['perplexityBase'])} → {_number(loss['perplexityTuned'])}"
        figures.append(Figure("Validation loss", _number(loss["evalTuned"]), perplexity, _number(loss["evalBase"])))
    if throughput["tokensPerSecond"]:
        note = f"{throughput['stepSeconds']:.3g} s a step"
        figures.append(Figure("Tokens per second", f"{throughput['tokensPerSecond']:,.0f}", note))
    if memory.get("peakBytes"):
        predicted = memory.get("predictedBytes")
        share = f"{100 * memory['peakBytes'] / predicted:.0f} % of the prediction" if predicted else ""
        figures.append(Figure("Peak memory", size(memory["peakBytes"]), share))
    figures.append(
        Figure(
            "Training time",
            duration(throughput["trainSeconds"]),
            f"of {duration(sum(report['seconds'].values()))} in all",
        )
    )
    return figures


def _loss_chart(loss: Json) -> Chart | None:
    curve = loss["curve"]
    series = [Series("training", _points(curve, "loss"))]
    if evaluations := _points(loss["evaluations"], "evalLoss"):
        series.append(Series("validation", evaluations, "second", marked=True))
    steps = [x for s in series for x, _ in s.points]
    if loss["evalBase"] is not None and steps:
        ends = [(min(steps), loss["evalBase"]), (max(steps), loss["evalBase"])]
        series.append(Series("validation, base model", ends, "rule"))
    return line_chart("Loss", "per token", series)


def _small_charts(curve: list[Json]) -> list[Chart]:
    wanted = (
        ("Learning rate", "", "learningRate"),
        ("Throughput", "tokens per second", "tokensPerSecond"),
        ("Gradient norm", "", "gradNorm"),
    )
    charts = [
        line_chart(title, unit, [Series(title.lower(), _points(curve, key))], from_zero=True)
        for title, unit, key in wanted
    ]
    return [chart for chart in charts if chart is not None]


def _points(curve: list[Json], key: str) -> list[Point]:
    return [(entry["step"], entry[key]) for entry in curve if entry.get(key) is not None]


def _rows(data: Json) -> tuple[Bar, ...]:
    """What became of the rows: trained on, held out, dropped."""
    dropped = data.get("dropped") or ({"dropped": data["droppedRows"]} if data["droppedRows"] else {})
    amounts = {"training": data["trainRows"], "validation": data["validationRows"]} | {
        DROPPED.get(reason, reason): count for reason, count in dropped.items()
    }
    amounts = {name: count for name, count in amounts.items() if count}
    return bars(amounts, of=sum(amounts.values()))


def _data_facts(data: Json) -> list[Fact]:
    facts = [
        Fact("Format", data["format"]),
        Fact("Training tokens", f"{data['trainTokens']:,}"),
        Fact("Cut at the maximum length", f"{data['truncatedRows']:,} rows"),
    ]
    if data.get("sharedRows"):
        facts.append(Fact("Also in the validation data", f"{data['sharedRows']:,} rows"))
    if data["packed"]:
        facts.append(Fact("Packed into", f"{data['sequences']:,} sequences, {100 * data['filled']:.1f} % filled"))
    return facts


def _memory(memory: Json) -> Memory | None:
    if not memory.get("predictedBytes"):
        return None
    measured, device = memory.get("peakBytes"), memory.get("gpuMemoryBytes")
    whole = max(memory["predictedBytes"], measured or 0, device or 0)
    parts = dict(sorted((memory.get("breakdown") or {}).items(), key=lambda part: -part[1]))
    return Memory(
        predicted=Bar("predicted", memory["predictedBytes"], 100 * memory["predictedBytes"] / whole),
        parts=bars({_words(name): count for name, count in parts.items() if count}, of=whole),
        measured=Bar("measured", measured, 100 * measured / whole) if measured else None,
        device=Bar("GPU", device, 100 * device / whole) if device else None,
    )


def _phases(seconds: Json) -> tuple[Bar, ...]:
    longest_first = sorted(seconds.items(), key=lambda phase: -phase[1])
    return bars({PHASES.get(name, name): value for name, value in longest_first}, of=sum(seconds.values()))


def _run_facts(report: Json) -> list[Fact]:
    training, model = report["training"], report["model"]
    quantization = model["quantization"]
    double = ", double quantization" if True in quantization["doubleQuant"] else ""
    batch = training["microBatchSize"] * training["gradientAccumulation"]
    facts = [
        Fact("Device", report.get("plan", {}).get("gpuClass") or training["device"]),
        Fact("Precision", training["precision"]),
        Fact("Base weights", f"{'/'.join(quantization['type'])}{double}, {_parameters(model['quantizedParameters'])}"),
        Fact("Trained weights", _parameters(model["trainableParameters"])),
        Fact("Optimizer", training["optimizer"]),
        Fact("Batch", f"{batch} = {training['microBatchSize']} × {training['gradientAccumulation']} accumulated"),
        Fact("Checkpointing", training["checkpointing"]),
        Fact("Epochs", f"{training['epochs']:.3g}"),
        Fact("Warm-up", f"{training['warmupSteps']:,} of {training['steps']:,} steps"),
    ]
    if training["resumedAt"]:
        facts.append(Fact("Resumed at step", ", ".join(f"{step:,}" for step in training["resumedAt"])))
    if "merge" in report:
        facts.append(Fact("Merged model", f"{report['merge']['dtype']}, {size(report['merge']['bytes'])}"))
        if gguf := report["merge"].get("gguf"):
            facts.append(Fact("GGUF", f"{gguf['quantization']}, {size(gguf['bytes'])}"))
    return facts


def _provenance(report: Json) -> list[Fact]:
    source = report["provenance"]
    versions = f" {MIDDLE} ".join(f"{name} {version}" for name, version in sorted(source["versions"].items()))
    return [
        Fact("Run", report["runId"], code=True),
        Fact("Model", source["modelUri"], code=True),
        Fact("Revision", source["modelRevision"], code=True),
        Fact("Dataset", source["datasetUri"], code=True),
        Fact("Digest", source["datasetDigest"], code=True),
        Fact("Image", source["image"] or "–", code=True),
        Fact("Seed", str(source["seed"])),
        Fact("Versions", versions),
    ]


def duration(seconds: float) -> str:
    """A time span, in its two largest units."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60)} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def size(count: float) -> str:
    """Bytes in decimal units, as GPUs and disks are sold."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def short(count: int) -> str:
    """A power of two as people say it: 512, 1k, 2k."""
    return f"{count // 1024}k" if count >= 1024 else str(count)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _parameters(count: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit} parameters"
    return f"{count:,} parameters"


def _words(name: str) -> str:
    """The breakdown's camelCase as words."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()
