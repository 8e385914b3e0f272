"""S3 is away, slow, or breaks what is sent; what is stored is spoilt: it is waited for, sent again, or passed over."""

from __future__ import annotations

import time

import pytest

from demo.verify import list_keys
from tests.chaos.cell import BUCKET, MOMENTS, SAVE_STEPS, Cell
from tests.chaos.faults import Faults
from tests.chaos.ledger import LEDGER
from tests.support.faulty_s3 import cut_upload, delay, error, reset

pytestmark = pytest.mark.cluster
DOWN_SECONDS = 60.0
WITH_PODS = ("preparing", "training", "merging")


@pytest.mark.long
@pytest.mark.parametrize("phase", WITH_PODS)
def test_s3_down_for_a_minute(cell: Cell, phase: str) -> None:
    with cell.at(phase):
        LEDGER.faults += 1
        cell.storage.inject(reset)
    time.sleep(DOWN_SECONDS)  # the fault itself
    cell.storage.heal()
    cell.check()


@pytest.mark.long
@pytest.mark.parametrize("phase", WITH_PODS)
def test_s3_throttles(cell: Cell, phase: str) -> None:
    with cell.at(phase):
        LEDGER.faults += 1
        cell.storage.inject(error(503, "SlowDown"), times=20)
    cell.check()


@pytest.mark.long
@pytest.mark.parametrize("phase", WITH_PODS)
def test_s3_is_slow(cell: Cell, phase: str) -> None:
    with cell.at(phase):
        LEDGER.faults += 1
        cell.storage.inject(delay(2.0), times=8)
    cell.check()


UPLOADS = {
    "checkpoint": r"PUT \S+/checkpoints/step-4\.[0-9a-f]+/adapter_model\.safetensors",
    "manifest of a checkpoint": MOMENTS["training"],
    "adapter": r"PUT \S+/adapter/adapter_model\.safetensors",
    "manifest": r"PUT \S+/[0-9a-z]+/manifest\.json",
    "part of the merged model": MOMENTS["merging"],
}


@pytest.mark.long  # make test cuts uploads without a cluster: tests/unit/trainer/test_s3_faults.py
@pytest.mark.parametrize("what", UPLOADS)
def test_upload_cut_in_half(cell: Cell, what: str) -> None:
    LEDGER.faults += 1
    rule = cell.storage.inject(cut_upload, UPLOADS[what], times=1)
    cell.apply({"merge": {"enabled": "merged" in what}})
    report = cell.check()
    assert rule.hits == 1
    assert report["training"]["resumedAt"] == []


@pytest.mark.parametrize("damage", ["changed", pytest.param("missing", marks=pytest.mark.long)])
def test_checkpoint_corrupted(cell: Cell, faults: Faults, damage: str) -> None:
    """The newest checkpoint is spoilt while its pod dies: the one before it is where the next pod begins."""
    spoilt = 2 * SAVE_STEPS
    with cell.storage.holding(rf"PUT \S+/checkpoints/step-{3 * SAVE_STEPS}\.") as arrived:
        cell.apply()
        assert arrived.wait(300)
        pod = cell.pod_of("train")
        LEDGER.faults += 1
        _spoil(cell, rf"/checkpoints/step-{spoilt}.", damage)
        faults.trainer_killed(pod)
        cell.until(lambda: not any(p.uid == pod.uid and p.live for p in cell.pods("train")), "the pod has ended")
    report = cell.check()
    assert report["training"]["resumedAt"] == [SAVE_STEPS]
    told = [event["message"] for event in cell.namespace.events(cell.name) if event["type"] == "Warning"]
    assert [text for text in told if f"checkpoint of step {spoilt} is skipped" in text]


def _spoil(cell: Cell, part: str, damage: str) -> None:
    keys = list_keys(cell.s3, BUCKET, f"{cell.namespace.name}/{cell.name}/")
    (key,) = [key for key in keys if part in key and key.endswith("/adapter_model.safetensors")]
    if damage == "missing":
        cell.s3.delete_object(Bucket=BUCKET, Key=key)
        return
    content = bytearray(cell.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    content[len(content) // 2] ^= 1
    cell.s3.put_object(Bucket=BUCKET, Key=key, Body=bytes(content))
