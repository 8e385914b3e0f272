"""A job whose model, data and output are in S3, on a real server."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer import patience
from qlora_trainer.s3 import client
from qlora_trainer.storage import Storage, open_storage
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.manifest import ArtifactManifest
from tests.support.faulty_s3 import Exchange, FaultyS3, error
from tests.unit.trainer.gateway import Gateway
from tests.unit.trainer.jobs import SPOILT, Job, spoil


def _upload(gateway: Gateway, uri: str, folder: Path, pattern: str = "*") -> Storage:
    storage = open_storage(uri, gateway.output(uri), field="output.uri")
    for path in folder.glob(pattern):
        storage.upload(path, path.name)
    return storage


@pytest.fixture
def s3_job(job: Job, gateway: Gateway, model_folder: Path, instructions: Path) -> Job:
    bucket = gateway.bucket()
    _upload(gateway, f"{bucket}/models/tiny", model_folder)
    _upload(gateway, f"{bucket}/data", instructions.parent, "*.jsonl")
    return job.change(
        model={"uri": f"{bucket}/models/tiny"},
        dataset={"uri": f"{bucket}/data"},
        output={"uri": f"{bucket}/adapters", "endpoint": gateway.endpoint},
        merge={"enabled": True},
        training={"saveSteps": 2},
    )


def _output(job: Job) -> Storage:
    spec = job.config().spec
    return open_storage(spec.output.uri, spec.output, field="output.uri")


def test_a_job_goes_from_s3_to_s3(s3_job: Job) -> None:
    prepared = s3_job.prepare()
    s3_job.train(prepared)
    s3_job.run("merge", s3_job.config(prepared))
    run = _output(s3_job).within(prepared.run_id)
    manifest = ArtifactManifest.model_validate_json(run.read("manifest.json") or b"")
    stored = {item.key: hashlib.sha256(run.read(item.key) or b"").hexdigest() for item in run.list()}
    del stored["manifest.json"]
    assert stored == {file.path: file.sha256 for file in manifest.files}
    assert {key.split("/")[0] for key in stored} == {"adapter", "merged", "tensorboard", "report.json", "report.html"}


def test_names_in_s3_are_percent_encoded_as_everywhere(s3_job: Job, gateway: Gateway, model_folder: Path) -> None:
    bucket = s3_job.spec["output"]["uri"].removesuffix("/adapters")
    storage = open_storage(bucket, gateway.output(bucket), field="output.uri")
    storage.write("My Data/100%/My rows.jsonl", storage.read("data/codes.jsonl") or b"")
    for path in model_folder.iterdir():
        storage.upload(path, f"My Data/tiny/{path.name}")
    s3_job.change(model={"uri": f"{bucket}/My%20Data/tiny"})
    for name in ("My%20Data/100%25", "My%20Data/100%25/My%20rows.jsonl"):
        assert s3_job.change(dataset={"uri": f"{bucket}/{name}"}).prepare().train_rows == 43


@pytest.mark.parametrize(("kept", "without", "words"), SPOILT)
def test_weights_that_are_not_whole_are_refused_by_their_head(
    s3_job: Job, gateway: Gateway, model_folder: Path, kept: int | None, without: str, words: str
) -> None:
    uri = f"{gateway.bucket()}/changed"
    spoil(model_folder, s3_job.folder / "changed", kept, without)
    _upload(gateway, uri, s3_job.folder / "changed")
    with pytest.raises(StepError) as refused:
        s3_job.change(model={"uri": uri}).prepare()
    assert words in refused.value.message
    assert (refused.value.reason, refused.value.field) == (Reason.MODEL_INVALID, "model.uri")


def test_prepare_reads_of_the_weights_their_head_alone(s3_job: Job, faulty: FaultyS3, model_folder: Path) -> None:
    read = []

    def count(exchange: Exchange) -> None:
        status, headers, content = exchange.forward()
        read.append((status, len(content)))
        exchange.answer(status, headers, content)

    faulty.inject(count, r"^GET .*\.safetensors", times=math.inf)
    s3_job.change(output={"endpoint": faulty.endpoint}).prepare()
    with (model_folder / "model.safetensors").open("rb") as file:
        assert read == [(206, 8), (206, 8 + int.from_bytes(file.read(8), "little"))]


def test_one_object_may_be_the_dataset(s3_job: Job) -> None:
    folder = s3_job.spec["dataset"]["uri"]
    assert s3_job.change(dataset={"uri": f"{folder}/codes.jsonl"}).prepare().train_rows == 43


def test_weights_that_changed_are_another_revision(s3_job: Job, gateway: Gateway) -> None:
    before = s3_job.prepare().model_revision
    uri = s3_job.spec["model"]["uri"]
    storage = open_storage(uri, gateway.output(uri), field="f")
    storage.write("model.safetensors", (storage.read("model.safetensors") or b"")[:-1] + b"\1")
    assert s3_job.prepare().model_revision != before


def test_weights_that_changed_after_prepare_are_refused(s3_job: Job, gateway: Gateway) -> None:
    prepared = s3_job.prepare()
    uri = s3_job.spec["model"]["uri"]
    open_storage(uri, gateway.output(uri), field="f").write("model.safetensors", b"other weights")
    with pytest.raises(StepError, match="has changed since it was prepared") as refused:
        s3_job.train(prepared)
    assert refused.value.field == "model.uri"


def test_prepare_brings_the_weights_into_the_cache_claim(s3_job: Job) -> None:
    cache = s3_job.folder / "mounts" / "cache"
    cache.mkdir(parents=True)
    prepared = s3_job.change(model={"cacheClaim": "weights"}).prepare()
    assert (cache / "models" / prepared.model_revision / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        pytest.param(
            {"output": {"uri": "s3://no-such-bucket/x"}}, Reason.BUCKET_NOT_FOUND, "output.uri", id="output bucket"
        ),
        pytest.param(
            {"model": {"uri": "s3://no-such-bucket/x"}}, Reason.BUCKET_NOT_FOUND, "model.uri", id="model bucket"
        ),
        pytest.param({"model": {"uri": "{bucket}/nothing"}}, Reason.MODEL_NOT_FOUND, "model.uri", id="model prefix"),
        pytest.param(
            {"dataset": {"uri": "{bucket}/nothing"}}, Reason.DATASET_NOT_FOUND, "dataset.uri", id="dataset prefix"
        ),
        pytest.param(
            {"dataset": {"uri": "{bucket}/nothing.jsonl"}}, Reason.DATASET_NOT_FOUND, "dataset.uri", id="dataset object"
        ),
    ],
)
def test_what_is_not_there_is_named(s3_job: Job, changes: dict[str, Any], reason: Reason, field: str) -> None:
    bucket = s3_job.spec["output"]["uri"].rpartition("/")[0]
    changes = {key: {"uri": value["uri"].format(bucket=bucket)} for key, value in changes.items()}
    with pytest.raises(StepError) as refused:
        s3_job.change(**changes).prepare()
    assert (refused.value.reason, refused.value.field, refused.value.code) == (reason, field, ExitCode.INVALID)


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_named(s3_job: Job, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "something-else")
    with pytest.raises(StepError) as refused:
        s3_job.prepare()
    assert (refused.value.reason, refused.value.field) == (Reason.ACCESS_DENIED, "output.credentialsSecretRef")


@pytest.mark.parametrize("folder", ["models", "data"])
def test_a_server_that_answers_but_not_now_is_waited_for_when_model_and_data_are_read(
    s3_job: Job, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "ATTEMPTS", 1)  # else botocore's own pauses take seconds
    throttled = [faulty.inject(error(503, "SlowDown"), request, times=3) for request in _reading(folder)]
    job = s3_job.change(output={"endpoint": faulty.endpoint})
    assert job.prepare().train_rows == 43
    assert [rule.hits for rule in throttled] == [3, 3]


@pytest.mark.parametrize("folder", ["models", "data"])
def test_a_model_or_data_that_may_not_be_read_are_not_waited_for(s3_job: Job, faulty: FaultyS3, folder: str) -> None:
    denied = faulty.inject(error(403, "AccessDenied"), _reading(folder)[0])
    with pytest.raises(StepError, match="AccessDenied"):
        s3_job.change(output={"endpoint": faulty.endpoint}).prepare()
    assert denied.hits == 1


def _reading(folder: str) -> tuple[str, str]:
    """Requests that list a folder, and that read one of its objects."""
    return f"^GET .*prefix={folder}", f"^GET /[^?]*/{folder}/"
