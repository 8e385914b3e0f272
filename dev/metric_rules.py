"""Hold every metric against Prometheus' own linter and against the design's rule that labels are bounded."""

from __future__ import annotations

import subprocess
import sys

from prometheus_client import CollectorRegistry, generate_latest

from qlora_operator.metrics import Metrics
from qlora_trainer.metrics import Telemetry
from qlorajob.status import Phase

BOUNDED_LABELS = {"namespace", "phase", "le", "version", "implementation", "major", "minor", "patchlevel"}


def _operator() -> CollectorRegistry:
    metrics = Metrics(lambda: [("default", Phase.TRAINING.value)])
    metrics.gpu_seconds.labels(namespace="default").inc(1)
    return metrics.registry


def _trainer() -> CollectorRegistry:
    telemetry = Telemetry()
    telemetry.advance(step=1, total_steps=2, loss=1.0, eval_loss=1.0, tokens_per_second=1.0)
    telemetry.speed(step_seconds=1.0, samples_per_second=1.0)
    telemetry.gpu_memory(allocated=1, reserved=1, peak=1, predicted=1)
    return telemetry.registry


def problems(registry: CollectorRegistry) -> list[str]:
    """What promtool says about the exposition, and labels that could grow without bound."""
    text = generate_latest(registry).decode()
    lint = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    found = [*lint.stdout.splitlines(), *lint.stderr.splitlines()]
    for family in registry.collect():
        labels = {label for sample in family.samples for label in sample.labels}
        found += [f"{family.name}: label {label} isn't bounded" for label in sorted(labels - BOUNDED_LABELS)]
    return found


def main() -> None:
    """Print every problem; fail when there is one."""
    found = [problem for registry in (_operator(), _trainer()) for problem in problems(registry)]
    sys.exit("\n".join(found) if found else 0)


if __name__ == "__main__":
    main()
