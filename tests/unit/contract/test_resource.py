"""A QLoRAJob object, as the API server stores it, is parsed once."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from qlorajob.resource import InvalidManifest, parse
from qlorajob.status import Phase, QLoRAJobStatus
from tests.unit.contract.manifests import manifest


def stored() -> dict[str, object]:
    obj = manifest()
    obj["metadata"] |= {
        "namespace": "team",
        "uid": "u-1",
        "generation": 3,
        "annotations": {"qlora.dev/retry-at": "now"},
        "labels": {"team": "a"},
        "managedFields": [],
        "deletionTimestamp": "2026-01-01T00:00:00Z",
    }
    obj["status"] = {"observedGeneration": 3, "phase": "Training"}
    return obj


def test_the_metadata_that_the_operator_uses_is_kept() -> None:
    metadata = parse(stored()).metadata

    assert (metadata.namespace, metadata.name, metadata.uid, metadata.generation) == ("team", "job", "u-1", 3)
    assert metadata.annotations == {"qlora.dev/retry-at": "now"}
    assert metadata.deletion_timestamp == datetime(2026, 1, 1, tzinfo=UTC)


def test_an_object_without_status_is_unseen() -> None:
    assert parse(manifest()).status == QLoRAJobStatus(observed_generation=-1)


def test_the_status_is_parsed() -> None:
    assert parse(stored()).status.phase is Phase.TRAINING


def test_what_another_version_wrote_into_the_status_is_dropped() -> None:
    newer = manifest()
    newer["status"] = {"observedGeneration": 1, "newField": 1, "run": {"id": "r1", "newField": 1}, "phase": None}

    status = parse(newer).status

    assert status.run is not None
    assert (status.run.id, status.phase) == ("r1", None)


def test_a_status_that_makes_no_sense_is_reported_by_field() -> None:
    broken = manifest()
    broken["status"] = {"run": {"attempt": -1}}

    with pytest.raises(InvalidManifest) as refusal:
        parse(broken)

    assert refusal.value.problems == ("status: run.id: is required; run.attempt: must be at least 0, not -1",)


def test_a_job_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse(manifest()).metadata.name = "other"  # type: ignore[misc]


def test_files_are_for_local_runs() -> None:
    local = manifest({"spec.model.uri": "file:///models/x", "spec.output.uri": "file:///tmp/out"})

    assert parse(local, local=True).spec.model.uri == "file:///models/x"
    with pytest.raises(InvalidManifest):
        parse(local)
