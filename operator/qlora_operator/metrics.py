"""The operator's own metrics. Labels are bounded: namespaces and phases, never a name, a step or a uid."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qlora_operator.decision import Measurement
from qlorajob.status import Phase

METRICS_PORT: Final = 9401
NamespacePhase = tuple[str, str]

QUEUE_BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600, 7 * 24 * 3600)
RATIO_BUCKETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.5, 2.0)


class _Jobs(Collector):
    """qlora_jobs, counted from the index at each scrape: nothing to keep in step."""

    def __init__(self, phases: Callable[[], Iterable[NamespacePhase]]) -> None:
        self._phases = phases

    def collect(self) -> Iterator[Metric]:
        """One sample for each phase of each namespace that has QLoRAJobs."""
        family = GaugeMetricFamily("qlora_jobs", "QLoRAJobs by phase.", labels=["namespace", "phase"])
        tally = Tally(self._phases())
        for namespace in sorted({namespace for namespace, _ in tally}):
            for phase in Phase:
                family.add_metric([namespace, phase.value], tally[namespace, phase.value])
        yield family


class Metrics:
    """One registry for one operator."""

    def __init__(self, phases: Callable[[], Iterable[NamespacePhase]]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.registry.register(_Jobs(phases))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.leader = Gauge(
            "qlora_operator_leader", "1 where this operator acts, 0 on standby.", registry=self.registry
        )
        self.reconcile_seconds = Histogram(
            "qlora_reconcile_seconds", "Time for one look at one QLoRAJob.", registry=self.registry
        )
        self.queue_seconds = Histogram(
            "qlora_queue_seconds",
            "Time from a training Job's creation to its pod's start.",
            buckets=QUEUE_BUCKETS,
            registry=self.registry,
        )
        self.gpu_seconds = Counter(
            "qlora_gpu_seconds", "GPU time held by running training pods.", ["namespace"], registry=self.registry
        )
        self.oom_replans = Counter(
            "qlora_oom_replans", "Plans made anew after training ran out of GPU memory.", registry=self.registry
        )
        self.vram_prediction_ratio = Histogram(
            "qlora_vram_prediction_ratio",
            "Measured peak of GPU memory over the predicted one.",
            buckets=RATIO_BUCKETS,
            registry=self.registry,
        )

    def record(self, measurements: Iterable[Measurement]) -> None:
        """What one decision measured."""
        for measurement in measurements:
            metric: Histogram | Counter = getattr(self, measurement.name)
            if isinstance(metric, Counter):
                metric.inc(measurement.value)
            else:
                metric.observe(measurement.value)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
