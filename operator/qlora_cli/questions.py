"""What `qlora plan` is asked, answered without a cluster: the plan for a manifest, and how every class would do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qlora_cli.manifests import ManifestError
from qlora_vram.catalog import lookup
from qlora_vram.cuts import Cutter, Option
from qlora_vram.facts import InvalidConfigError, model_facts
from qlora_vram.gpus import KNOWN, SHIPPED, GpuClass, usable_bytes
from qlora_vram.layers import detailed
from qlora_vram.outcome import DoesNotFit
from qlora_vram.planner import plan, rounded
from qlora_vram.workload import Workload
from qlorajob.plan import ModelFacts, Plan
from qlorajob.spec import QLoRAJobSpec

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""Weight files in a model's folder; the first kind that is there counts."""


@dataclass(frozen=True, slots=True)
class ClassAnswer:
    """How a job would do on one class."""

    gpu: GpuClass
    needed: int
    """Bytes of the cut that takes the least."""
    cut: Workload | None
    """The fastest cut that fits; None where none does."""
    speed: float
    """Its predicted tokens a second."""

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill."""
        return usable_bytes(self.gpu)

    def to_wire(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "name": self.gpu.name,
            "fits": self.cut is not None,
            "usableBytes": self.usable,
            "smallestPeakBytes": self.needed,
            "cost": self.gpu.cost,
            "predictedTokensPerSecond": self.speed if self.cut else None,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """The plan for a job, or why there is none; and every class."""

    facts: ModelFacts
    outcome: Plan | DoesNotFit
    classes: tuple[ClassAnswer, ...]

    def to_wire(self) -> dict[str, Any]:
        """As JSON: null where there is no plan, and then why."""
        found = self.outcome if isinstance(self.outcome, Plan) else None
        document: dict[str, Any] = {
            "predictedPeakBytes": found.predicted_peak_bytes if found else None,
            "breakdown": dict(found.breakdown) if found else None,
            "plan": found.to_wire() if found else None,
            "classes": [each.to_wire() for each in self.classes],
        }
        if isinstance(self.outcome, DoesNotFit):
            document["doesNotFit"] = {
                "reason": self.outcome.reason,
                "field": self.outcome.field,
                "message": self.outcome.message,
                "suggestions": [{"field": each.field, "value": each.value} for each in self.outcome.suggestions],
            }
        return document


def answer(spec: QLoRAJobSpec, facts: ModelFacts) -> Answer:
    """Plan `spec` for the classes that the operator ships with, or for any known one that it names."""
    facts = detailed(facts)
    named = spec.resources.gpu_class
    classes = [*SHIPPED, *(gpu for gpu in KNOWN if gpu.name == named and gpu not in SHIPPED)]
    asked = [gpu for gpu in classes if named in ("auto", gpu.name)]
    return Answer(facts, plan(spec, facts, classes), tuple(_on_each(spec, facts, asked)))


def _on_each(spec: QLoRAJobSpec, facts: ModelFacts, classes: Sequence[GpuClass]) -> list[ClassAnswer]:
    """Cheapest first, as the planner tries them."""
    answers = []
    for option in sorted(map(Option, classes), key=lambda option: option.order):
        cutter = Cutter(spec, facts, option)
        smallest = cutter.smallest()
        if smallest is None:
            continue
        needed = cutter.predicted(smallest)
        cut = cutter.fastest() if needed <= cutter.usable else None
        answers.append(ClassAnswer(option.gpu, needed, cut, rounded(cutter.speed(cut)) if cut else 0.0))
    return answers


# What is planned for


def facts_of(spec: QLoRAJobSpec, config: Path | None) -> ModelFacts:
    """Facts of the model, from `config` (a config.json or its folder), its own folder, or the catalogue.

    Raises:
        ManifestError: they can't be had here; the message says what to do.
    """
    scheme, _, rest = spec.model.uri.partition("://")
    if config is None and scheme == "file":
        config = Path(unquote(rest))
    if config is not None:
        return _facts_from_config(config)
    found = lookup(rest.partition("@")[0]) if scheme == "hf" else None
    if found is None:
        known = "isn't in the catalogue" if scheme == "hf" else "can't be read from here"
        raise ManifestError(
            f"spec.model.uri: {spec.model.uri} {known}: give its config.json with --config, or apply the manifest and "
            "let the operator look"
        )
    return found


def _facts_from_config(path: Path) -> ModelFacts:
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = model_facts(content, weight_bytes=_weight_bytes(file.parent)) if isinstance(content, dict) else None
    except OSError as error:
        raise ManifestError(f"{file} can't be read: {error.strerror}") from None
    except (ValueError, InvalidConfigError) as error:
        raise ManifestError(f"{file} is no model's config.json: {error}") from None
    if found is None:
        kind = content.get("model_type") if isinstance(content, dict) else None
        raise ManifestError(
            f"{file}: models of type {kind} aren't known without their code; apply the manifest and let the operator "
            "look"
        )
    return found


def _weight_bytes(folder: Path) -> int:
    for pattern in WEIGHTS:
        sizes = [file.stat().st_size for file in folder.glob(pattern)]
        if sizes:
            return sum(sizes)
    return 0


def change(document: dict[str, Any], question: str) -> None:
    """Set `training.maxSequenceLength=8192` in a manifest's spec. Values are YAML, as in the manifest itself.

    Raises:
        ManifestError: not of that form.
    """
    path, equals, text = question.partition("=")
    if not equals or not path:
        raise ManifestError(
            f"--what-if {question}: must be a field and its value, such as training.maxSequenceLength=8192"
        )
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise ManifestError(f"--what-if {question}: {text} is not valid YAML") from None
    *parents, name = path.removeprefix("spec.").split(".")
    place = document.setdefault("spec", {})
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ManifestError(f"--what-if {question}: {parent} has no fields")
    place[name] = value
