"""Fits what no tensor tells, the CUDA context and the allocator's slack, to measured peaks; and says how good that is.

    python -m bench.vram.fit [MEASURED.jsonl]

reads the points of docs/results/vram/points.json (after taking over new measurements, where a file is named), writes
operator/qlora_vram/calibration.json, and beside the points fit.json, table.md and predicted.svg.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.vram.plot import scatter
from bench.vram.points import HELD_OUT, Point
from qlora_vram import calibration
from qlora_vram.calibration import Calibration
from qlora_vram.memory import peak
from qlora_vram.workload import Workload

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "vram"
UNDER = 0.01
"""A prediction may be so much under what the driver counts, and no more."""
SLACKS = np.linspace(0, 0.4, 161)
FOLDS = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """A point and what the driver counted at its end, in bytes."""

    point: Point
    workload: Workload
    driver: int

    def error(self, constants: Calibration) -> float:
        """Relative error of the prediction; negative where it is too small."""
        return peak(self.workload, constants).total / self.driver - 1


def main() -> None:
    """Fit, cross-validate, write."""
    raw = json.loads((RESULTS / "points.json").read_text(encoding="utf-8")) if len(sys.argv) < 2 else _take(sys.argv[1])
    measured = [_read(found) for found in raw if "driver" in found]
    held_out = [each for each in measured if each.point in HELD_OUT]
    fitted = [each for each in measured if each.point not in HELD_OUT]
    constants = fit(fitted)
    crossed = cross_validate(fitted)
    summary = {
        "contextBytes": constants.context_bytes,
        "slackShare": constants.slack_share,
        "gpu": sorted({found["gpu"] for found in raw if "gpu" in found}),
        "fitted": quality([each.error(constants) for each in fitted]),
        "crossValidated": quality(crossed),
        "heldOut": quality([each.error(constants) for each in held_out]),
    }
    shipped = {"contextBytes": constants.context_bytes, "slackShare": constants.slack_share}
    calibration.FILE.write_text(json.dumps(shipped, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "fit.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "table.md").write_text(table(measured, constants), encoding="utf-8")
    pairs = [(each.driver / 2**30, peak(each.workload, constants).total / 2**30) for each in measured]
    (RESULTS / "predicted.svg").write_text(scatter(pairs), encoding="utf-8")
    print(json.dumps(summary, indent=2))


def fit(points: Sequence[Measured]) -> Calibration:
    """The constants with the least mean error that are nowhere more than UNDER too small."""
    best: tuple[float, Calibration] | None = None
    drivers = np.array([each.driver for each in points], float)
    for slack in SLACKS:
        without = np.array([peak(each.workload, Calibration(0, float(slack))).total for each in points], float)
        least = float(np.max((1 - UNDER) * drivers - without))
        for context in (least, max(least, float(np.median(drivers - without)))):
            if context < 0:
                continue
            error = float(np.mean(np.abs((without + context) / drivers - 1)))
            if best is None or error < best[0]:
                best = error, Calibration(int(np.ceil(context)), round(float(slack), 4))
    if best is None:
        raise ValueError("the tensors alone are more than was measured: the model is wrong, not the constants")
    return best[1]


def cross_validate(points: Sequence[Measured]) -> list[float]:
    """Errors of points that weren't in the fit, each once."""
    folds = [list(points[number::FOLDS]) for number in range(FOLDS)]
    errors = []
    for fold in folds:
        constants = fit([each for each in points if each not in fold])
        errors += [each.error(constants) for each in fold]
    return errors


def quality(errors: Sequence[float]) -> dict[str, Any]:
    """How good predictions are; errors are relative to the driver's bytes."""
    if not errors:
        return {"points": 0}
    sizes = np.abs(errors)
    return {
        "points": len(errors),
        "mean": round(float(np.mean(sizes)), 4),
        "atNinetyPercent": round(float(np.quantile(sizes, 0.9)), 4),
        "largest": round(float(np.max(sizes)), 4),
        "mostUnder": round(float(min(0.0, *errors)), 4),
    }


def table(points: Sequence[Measured], constants: Calibration) -> str:
    """All points as a Markdown table."""
    lines = [
        "| model | rows x length | checkpointed | rank | path | driver GiB | predicted GiB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in points:
        point, work = each.point, each.workload
        how = f"{min(point.checkpointed, work.facts.layers)}/{work.facts.layers}{' offloaded' if point.offload else ''}"
        rows = f"{point.rows} x {point.length}{' packed' if point.packing else ''}"
        predicted = peak(work, constants).total
        lines.append(
            f"| {point.model} | {rows} | {how} | {point.rank} "
            f"| {work.engine} | {each.driver / 2**30:.2f} | {predicted / 2**30:.2f} | {each.error(constants):+.1%} |"
        )
    return "\n".join(lines) + "\n"


def _take(name: str) -> list[dict[str, Any]]:
    """New measurements become the committed points."""
    lines = Path(name).read_text(encoding="utf-8").splitlines()
    raw: list[dict[str, Any]] = [json.loads(line) for line in lines if line.startswith('{"point"')]
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = "[\n" + ",\n".join(json.dumps(found) for found in raw) + "\n]\n"
    (RESULTS / "points.json").write_text(text, encoding="utf-8")
    return raw


def _read(found: dict[str, Any]) -> Measured:
    point = Point.from_json(found["point"])
    # The path that was taken: a family may be covered and the way in which bench.models sets up this config not.
    return Measured(point, replace(point.workload(), engine=found["engine"]), found["driver"])


if __name__ == "__main__":
    main()
