"""Fits what no tensor tells, the CUDA context and the allocator's slack, to measured peaks; and says how good that is.

    python -m bench.vram.fit [MEASURED.jsonl...] [--held-out] [--keep]

adds new measurements to docs/results/vram/points.json, where older ones stay; writes qlora_vram's calibration.json, and
beside the points fit.json, table.md and predicted.svg. The newest measurement of a point counts. Points of
`points.HELD_OUT`, and those of a file that was taken with --held-out, are never fitted. --keep fits nothing: the
shipped constants are judged. The recipes' runs (docs/results/recipes.json) are fitted like points.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.recipes import predictions
from bench.recipes.cases import RECIPES
from bench.vram.plot import scatter
from bench.vram.points import HELD_OUT, Point, outdated
from qlora_vram import calibration
from qlora_vram.calibration import Calibration
from qlora_vram.memory import peak
from qlora_vram.workload import Workload

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "vram"
UNDER = 0.008
"""A prediction may be so much under what the driver counts, and no more: 1 % is promised of points that aren't here."""
SLACKS = np.linspace(0, 0.4, 161)
FOLDS = 5


Use = Literal["fitted", "recipe", "held out", "outdated"]


@dataclass(frozen=True, slots=True)
class Measured:
    """A point and what the driver counted at its end, in bytes."""

    point: Point
    workload: Workload
    driver: int
    use: Use = "fitted"
    """Outdated: the trainer has changed since, in what this point measures. A recipe is fitted, too."""

    def error(self, constants: Calibration) -> float:
        """Relative error of the prediction; negative where it is too small."""
        return peak(self.workload, constants).total / self.driver - 1


def main() -> None:
    """Take over, fit, cross-validate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="what bench.vram.worker printed")
    parser.add_argument("--held-out", action="store_true", help="try the constants on these points, don't fit them")
    parser.add_argument("--keep", action="store_true", help="leave the constants as they are")
    options = parser.parse_args()
    raw = merged(_committed(), (_lines(path) for path in options.files), held_out=options.held_out)
    (RESULTS / "points.json").write_text(_as_text(raw), encoding="utf-8")
    measured = points()
    held_out = [each for each in measured if each.use == "held out"]
    fitted = [each for each in measured if each.use in ("fitted", "recipe")]
    constants = calibration.shipped() if options.keep else fit(fitted)
    crossed = cross_validate(fitted)
    summary = {
        "contextBytes": constants.context_bytes,
        "slackShare": constants.slack_share,
        "gpu": sorted({found["gpu"] for found in raw if "gpu" in found}),
        "fitted": quality([each.error(constants) for each in fitted]),
        "crossValidated": quality(crossed),
        "heldOut": quality([each.error(constants) for each in held_out]),
        "recipes": quality([each.error(constants) for each in measured if each.use == "recipe"]),
        "outdated": sum(each.use == "outdated" for each in measured),
    }
    shipped = {"contextBytes": constants.context_bytes, "slackShare": constants.slack_share}
    calibration.FILE.write_text(json.dumps(shipped, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "fit.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "table.md").write_text(table(measured, constants), encoding="utf-8")
    pairs = [(each.driver / 2**30, peak(each.workload, constants).total / 2**30) for each in measured]
    (RESULTS / "predicted.svg").write_text(scatter(pairs), encoding="utf-8")
    print(json.dumps(summary, indent=2))


def fit(measured: Sequence[Measured]) -> Calibration:
    """The constants with the least mean error that are nowhere more than UNDER too small."""
    best: tuple[float, Calibration] | None = None
    drivers = np.array([each.driver for each in measured], float)
    for slack in SLACKS:
        without = np.array([peak(each.workload, Calibration(0, float(slack))).total for each in measured], float)
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


def cross_validate(measured: Sequence[Measured]) -> list[float]:
    """Errors of points that weren't in the fit, each once."""
    folds = [list(measured[number::FOLDS]) for number in range(FOLDS)]
    errors = []
    for fold in folds:
        constants = fit([each for each in measured if each not in fold])
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


def table(measured: Sequence[Measured], constants: Calibration) -> str:
    """All points as a Markdown table."""
    lines = [
        "| model | rows x length | checkpointed | rank | path | driver GiB | predicted GiB | error | use |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in measured:
        point, work = each.point, each.workload
        how = f"{min(point.checkpointed, work.facts.layers)}/{work.facts.layers}"
        how += f"{' offloaded' if point.offload else ''}{' cached' if point.cached else ''}"
        rows = f"{point.rows} x {point.length}{' packed' if point.packing else ''}"
        predicted = peak(work, constants).total
        lines.append(
            f"| {point.model} | {rows} | {how} | {point.rank} | {work.engine} "
            f"| {each.driver / 2**30:.2f} | {predicted / 2**30:.2f} | {each.error(constants):+.1%} | {each.use} |"
        )
    return "\n".join(lines) + "\n"


def merged(
    old: Sequence[dict[str, Any]], files: Iterable[Sequence[dict[str, Any]]], *, held_out: bool = False
) -> list[dict[str, Any]]:
    """All measurements, the new ones last; none twice. Those that failed are left out."""
    found = list(old)
    for each in files:
        for new in each:
            if "driver" in new:
                new = {**new, "heldOut": True} if held_out or Point.from_json(new["point"]) in HELD_OUT else new
                found += [] if new in found else [new]
    return found


def newest(raw: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last measurement of each point. A point that was held out once stays so."""
    last = {Point.from_json(found["point"]): found for found in raw}
    held_out = {Point.from_json(found["point"]) for found in raw if found.get("heldOut")}
    return [{**found, "heldOut": True} if point in held_out else found for point, found in last.items()]


def _committed() -> list[dict[str, Any]]:
    path = RESULTS / "points.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"point"')]


def points() -> list[Measured]:
    """All that is committed and counts."""
    return [*(_read(found) for found in newest(_committed())), *_recipes()]


def _recipes() -> list[Measured]:
    """The recipes' runs, whose rows are of changing lengths: points of their longest rows."""
    found = json.loads((RESULTS.parent / "recipes.json").read_text(encoding="utf-8"))
    return [_recipe(result) for result in found if not {"error", "outdated"} & result.keys()]


def _recipe(result: dict[str, Any]) -> Measured:
    work = predictions.measured(result)
    model, shape = RECIPES[result["recipe"]].model, work.shape
    point = Point(
        model, shape.rows, work.length, shape.checkpointed_layers, shape.offload, work.rank, packing=work.packing,
        cached=shape.cached,
    )  # fmt: skip
    return Measured(point, work, result["driver"], "recipe")


def _as_text(raw: Sequence[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(found) for found in raw) + "\n]\n"


def _read(found: dict[str, Any]) -> Measured:
    point = Point.from_json(found["point"])
    # The path that was taken: a family may be covered and the way in which bench.models sets up this config not.
    work = replace(point.workload(), engine=found["engine"])
    stale = outdated(work, found.get("code", 1))
    return Measured(
        point, work, found["driver"], "outdated" if stale else "held out" if found.get("heldOut") else "fitted"
    )


if __name__ == "__main__":
    main()
