"""QLoRAJobs that ask for one run in one place, as when one manifest is applied in two namespaces: one is at work at a
time, and the others find what it has written. Without this both would train, and two merges would mix their files.
"""

from __future__ import annotations

from qlora_operator.decision import CreateJob, Decision
from qlora_operator.observed import job_view
from qlora_operator.store import Key, Raw, Store, label_of
from qlorajob import names

Place = tuple[str, str | None]
"""URI and endpoint of spec.output."""


class Rivals:
    """Who is at work on which run. What is about to be created counts: it is in no index yet."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._starting: dict[Key, str] = {}

    def of(self, key: Key, run: str) -> tuple[str, ...]:
        """Others, as namespace/name, that are at work on this run into the output of `key`'s."""
        mine = _place(self._store.qlorajob(key))
        candidates = {*self._store.with_jobs_labelled(names.LABEL_RUN, run), *self._starting} - {key}
        return tuple(
            str(other)
            for other in sorted(candidates)
            if _place(self._store.qlorajob(other)) == mine and self._works_on(other, run)
        )

    def start(self, key: Key, run: str) -> None:
        """It is about to create a Job for the run. To be called in one go with `of`, without an await between."""
        self._starting[key] = run

    def started(self, key: Key) -> None:
        """It has been carried out, or not: the store knows."""
        self._starting.pop(key, None)

    def _works_on(self, key: Key, run: str) -> bool:
        jobs = (job_view(raw) for raw in self._store.jobs(key) if _run(raw) == run)
        return self._starting.get(key) == run or any(job.live for job in jobs)


def started_run(decision: Decision) -> str | None:
    """The run that the decision creates a Job for."""
    created = (_run(action.manifest) for action in decision.actions if isinstance(action, CreateJob))
    return next(filter(None, created), None)


def _run(job: Raw) -> str | None:
    """The run that a Job trains or merges."""
    return label_of(job, names.LABEL_RUN)


def _place(qlorajob: Raw | None) -> Place | None:
    output = ((qlorajob or {}).get("spec") or {}).get("output") or {}
    return (output["uri"].rstrip("/"), output.get("endpoint")) if "uri" in output else None
