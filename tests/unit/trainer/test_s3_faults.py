"""A real S3 server on a bad day: what a user is told, what is tried again, and what is left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import boto3
import botocore.auth
import pytest

from qlora_trainer import patience
from qlora_trainer.artifacts import open_output
from qlora_trainer.patience import PatientStorage
from qlora_trainer.s3 import client, upload
from qlora_trainer.signals import Stopped, StopSignal
from qlora_trainer.storage import Storage, open_storage
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.spec import OutputSpec
from tests.support.faulty_s3 import (
    Fault,
    FaultyS3,
    cut_answer,
    cut_upload,
    delay,
    error,
    flip_a_bit,
    hang_up,
    lose_answer,
    reset,
)
from tests.support.reports import prepared
from tests.unit.trainer.gateway import ACCESS_KEY, SECRET_KEY, Gateway, running
from tests.unit.trainer.jobs import Job

SMALL, IN_PARTS = 1000, 12 << 20


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses in which a test can wait, and files in several parts that it can make."""
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(upload, "PART_BYTES", 5 << 20)


@pytest.fixture
def bucket(gateway: Gateway) -> str:
    return gateway.bucket()


def _open(endpoint: str, bucket: str) -> Storage:
    fields = {"uri": bucket, "endpoint": endpoint, "credentialsSecretRef": {"name": "s3-credentials"}}
    return open_storage(f"{bucket}/team", OutputSpec.model_validate(fields), field="output.uri")


@pytest.fixture
def storage(faulty: FaultyS3, bucket: str) -> Storage:
    return _open(faulty.endpoint, bucket)


@pytest.fixture
def patient(storage: Storage) -> Storage:
    return PatientStorage(storage, StopSignal(), seconds=30)


@pytest.fixture
def unfinished(gateway: Gateway, bucket: str) -> Callable[[], list[str]]:
    """Keys of multipart uploads that neither ended nor were aborted."""
    s3 = boto3.client("s3", endpoint_url=gateway.endpoint, region_name="us-east-1")
    name = bucket.removeprefix("s3://")

    def look() -> list[str]:
        return [item["Key"] for item in s3.list_multipart_uploads(Bucket=name).get("Uploads", [])]

    return look


def _file(folder: Path, size: int) -> Path:
    path = folder / "file"
    path.write_bytes(bytes(number * 7 % 251 for number in range(1 << 12)) * (size // (1 << 12) + 1))
    return path


# What is got over


@pytest.mark.parametrize("size", [SMALL, IN_PARTS], ids=["small", "in parts"])
@pytest.mark.parametrize(
    "fault",
    [
        error(500, "InternalError"),
        error(503, "ServiceUnavailable"),
        hang_up,
        reset,
        cut_upload,
        flip_a_bit,
        lose_answer,
    ],
    ids=["500", "503", "hang up", "reset", "cut in half", "bit flipped", "answer lost"],
)
def test_an_upload_gets_over_it_and_leaves_nothing_behind(
    patient: Storage,
    faulty: FaultyS3,
    gateway: Gateway,
    bucket: str,
    tmp_path: Path,
    unfinished: Callable[[], list[str]],
    fault: Fault,
    size: int,
) -> None:
    path = _file(tmp_path, size)
    faulty.inject(fault, "^PUT", times=6)
    patient.upload(path, "file")
    _open(gateway.endpoint, bucket).download("file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    assert unfinished() == []


@pytest.mark.parametrize("fault", [hang_up, reset, cut_answer, error(500, "InternalError")])
def test_a_download_gets_over_it(patient: Storage, faulty: FaultyS3, tmp_path: Path, fault: Fault) -> None:
    path = _file(tmp_path, IN_PARTS)
    patient.upload(path, "file")
    faulty.inject(fault, "^GET", times=3)
    patient.download("file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_a_small_object_whose_answer_breaks_off_is_read_again(patient: Storage, faulty: FaultyS3) -> None:
    patient.write("key", b"content" * 1000)
    faulty.inject(cut_answer, "^GET", times=2)
    assert patient.read("key") == b"content" * 1000


def test_a_server_that_is_slow_is_waited_for(patient: Storage, faulty: FaultyS3, tmp_path: Path) -> None:
    faulty.inject(delay(0.3))
    patient.upload(_file(tmp_path, IN_PARTS), "file")
    assert [item.key for item in patient.list()] == ["file"]


def test_a_server_that_never_answers_is_given_up(
    faulty: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "READ_SECONDS", 0.2)
    storage = _open(faulty.endpoint, bucket)
    with faulty.holding("^GET"), pytest.raises(StepError) as failed:
        storage.read("key")
    assert (failed.value.reason, failed.value.code) == (Reason.ENDPOINT_UNREACHABLE, ExitCode.TRANSIENT)
    assert failed.value.field == "output.endpoint"


# What isn't


@pytest.mark.parametrize("fault", [cut_upload, error(500, "InternalError")], ids=["cut", "500"])
def test_an_upload_that_fails_leaves_neither_object_nor_parts(
    storage: Storage, faulty: FaultyS3, tmp_path: Path, unfinished: Callable[[], list[str]], fault: Fault
) -> None:
    faulty.inject(fault, "^PUT .*partNumber=2")
    with pytest.raises(StepError) as failed:
        storage.upload(_file(tmp_path, IN_PARTS), "file")
    assert failed.value.code is ExitCode.TRANSIENT
    assert (list(storage.list()), unfinished()) == ([], [])


def test_an_upload_that_a_stop_breaks_off_leaves_no_parts(
    storage: Storage, faulty: FaultyS3, tmp_path: Path, unfinished: Callable[[], list[str]]
) -> None:
    faulty.inject(delay(0.2), "^PUT")
    before = signal.signal(signal.SIGTERM, StopSignal()._handle)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Stopped):
            storage.upload(_file(tmp_path, 8 * IN_PARTS), "file")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (list(storage.list()), unfinished()) == ([], [])


def test_parts_of_a_process_that_was_killed_are_dropped_by_the_next(
    storage: Storage, faulty: FaultyS3, tmp_path: Path, unfinished: Callable[[], list[str]]
) -> None:
    faulty.inject(hang_up, "^(PUT .*partNumber=2|DELETE)")  # it isn't there any more to abort
    with pytest.raises(StepError):
        storage.upload(_file(tmp_path, IN_PARTS), "run/file")
    faulty.heal()
    assert unfinished() == ["team/run/file"]
    assert storage.within("other").abort_uploads() == 0
    assert storage.within("run").abort_uploads() == 1
    assert unfinished() == []


def test_an_upload_whose_end_nobody_heard_of_is_made_again(
    patient: Storage, faulty: FaultyS3, tmp_path: Path, unfinished: Callable[[], list[str]]
) -> None:
    faulty.inject(lose_answer, "^POST .*uploadId", times=1)
    patient.upload(_file(tmp_path, IN_PARTS), "file")
    assert [item.key for item in patient.list()] == ["file"]
    assert unfinished() == []


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (501, "NotImplemented")])
def test_looking_for_old_parts_may_be_impossible(storage: Storage, faulty: FaultyS3, status: int, code: str) -> None:
    faulty.inject(error(status, code), "^GET .*uploads")
    assert storage.abort_uploads() == 0


@pytest.mark.parametrize(("status", "code"), [(507, "InsufficientStorage"), (403, "QuotaExceeded")])
def test_a_full_bucket_is_told_and_may_be_emptied(storage: Storage, faulty: FaultyS3, status: int, code: str) -> None:
    faulty.inject(error(status, code), "^PUT")
    with pytest.raises(StepError, match=r"output\.uri: bucket .* is full") as failed:
        storage.write("key", b"x")
    assert (failed.value.reason, failed.value.code) == (Reason.STORAGE_UNAVAILABLE, ExitCode.TRANSIENT)


def test_a_clock_that_is_wrong_is_told_from_credentials_that_are(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., datetime] = botocore.auth.get_current_datetime
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *a, **k: real(*a, **k) - timedelta(hours=1))
    monkeypatch.setattr("qlora_trainer.s3.errors._now", lambda: real(remove_tzinfo=False) - timedelta(hours=1))
    with pytest.raises(StepError, match="60 minutes apart") as failed:
        storage.write("key", b"x")
    assert (failed.value.reason, failed.value.code) == (Reason.CLOCK_SKEWED, ExitCode.TRANSIENT)


# A bucket that can only be read


@pytest.fixture
def read_only(gateway: Gateway) -> Iterator[Gateway]:
    """A second server on the same disk that refuses to write."""
    with running(gateway.disk.parent, "--readonly") as second:
        yield second


def test_a_bucket_that_can_only_be_read_is_found_before_a_gpu_is_taken(
    job: Job, read_only: Gateway, gateway: Gateway
) -> None:
    job.change(output={"uri": f"{gateway.bucket()}/out", "endpoint": read_only.endpoint})
    with pytest.raises(StepError, match="when asked to write in bucket") as refused:
        job.prepare()
    assert (refused.value.reason, refused.value.code) == (Reason.ACCESS_DENIED, ExitCode.INVALID)
    assert refused.value.field == "output.credentialsSecretRef"


def test_a_bucket_that_becomes_read_only_ends_training_for_good(
    job: Job, faulty: FaultyS3, bucket: str, read_only: Gateway
) -> None:
    job.change(output={"uri": f"{bucket}/out", "endpoint": faulty.endpoint}, training={"saveSteps": 1})
    prepared = job.prepare()
    faulty.upstream = urlsplit(read_only.endpoint).netloc
    with pytest.raises(StepError, match=r"refuses the pod's own identity .* when asked to write") as refused:
        job.train(prepared)
    assert (refused.value.reason, refused.value.code) == (Reason.ACCESS_DENIED, ExitCode.INVALID)


# Credentials


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write the mounted Secret. The environment holds other credentials, as of a pod that started long ago."""
    folder = tmp_path / "mounts" / "s3-credentials"
    folder.mkdir(parents=True)
    monkeypatch.setenv("QLORA_MOUNT_ROOT", str(tmp_path / "mounts"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-the-environment")

    def write(access_key: str, secret_key: str) -> None:
        (folder / "AWS_ACCESS_KEY_ID").write_text(access_key + "\n")
        (folder / "AWS_SECRET_ACCESS_KEY").write_text(secret_key)

    write(ACCESS_KEY, SECRET_KEY)
    return write


@pytest.fixture
def rotated(gateway: Gateway) -> Iterator[Gateway]:
    """The same disk behind other credentials."""
    with running(gateway.disk.parent, "--access", "new-access", "--secret", "new-secret-key") as second:
        yield second


def test_a_secret_that_is_rotated_while_training_is_read_again(
    secret: Callable[..., None], rotated: Gateway, faulty: FaultyS3, patient: Storage
) -> None:
    patient.write("before", b"x")
    faulty.upstream = urlsplit(rotated.endpoint).netloc
    threading.Timer(0.5, secret, ("new-access", "new-secret-key")).start()  # the kubelet takes its time
    patient.write("after", b"x")
    assert [item.key for item in patient.list()] == ["after", "before"]


def test_a_rotated_secret_is_hidden_from_logs(secret: Callable[..., None], patient: Storage) -> None:
    from qlora_trainer import logs

    secret(ACCESS_KEY, "another-secret")
    with pytest.raises(StepError):
        patient.write("key", b"x")
    assert logs.redact("signed with another-secret") == "signed with ***"


def test_credentials_that_run_out_while_training_are_told_and_tried_again(
    secret: Callable[..., None], rotated: Gateway, faulty: FaultyS3, storage: Storage
) -> None:
    storage.write("before", b"x")
    faulty.upstream = urlsplit(rotated.endpoint).netloc
    with pytest.raises(StepError, match="no longer accepts the credentials in Secret s3-credentials") as refused:
        storage.write("after", b"x")
    assert (refused.value.reason, refused.value.code) == (Reason.ACCESS_DENIED, ExitCode.TRANSIENT)
    assert refused.value.field == "output.credentialsSecretRef"


def test_credentials_that_never_worked_are_wrong_for_good(secret: Callable[..., None], storage: Storage) -> None:
    secret(ACCESS_KEY, "wrong")
    with pytest.raises(StepError, match="refuses the credentials in Secret s3-credentials") as refused:
        storage.write("key", b"x")
    assert (refused.value.reason, refused.value.code) == (Reason.ACCESS_DENIED, ExitCode.INVALID)


def test_credentials_that_run_out_between_two_steps_or_pods_are_tried_again(
    secret: Callable[..., None], job: Job, bucket: str, gateway: Gateway
) -> None:
    """A pod that starts while a Secret is being renewed: prepare could use it, so it wasn't wrong."""
    secret(ACCESS_KEY, "expired")
    job.change(output={"uri": bucket, "endpoint": gateway.endpoint, "credentialsSecretRef": {"name": "s3-credentials"}})
    for config, code in ((job.config(), ExitCode.INVALID), (job.config(prepared("key")), ExitCode.TRANSIENT)):
        with pytest.raises(StepError) as refused:
            open_output(job.settings(config)).read("manifest.json")
        assert (refused.value.reason, refused.value.code) == (Reason.ACCESS_DENIED, code)


def test_a_mounted_file_that_is_gone_for_a_moment_does_no_harm(
    secret: Callable[..., None], storage: Storage, tmp_path: Path
) -> None:
    storage.write("before", b"x")
    (tmp_path / "mounts" / "s3-credentials" / "AWS_SECRET_ACCESS_KEY").unlink()
    storage.write("after", b"x")


class _Sts(BaseHTTPRequestHandler):
    """Gives the gateway's credentials, for a minute, to whoever has a token."""

    tokens: list[str]

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.tokens.append(form["WebIdentityToken"][0])
        name, until = "AssumeRoleWithWebIdentity", (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
        content = (
            f"<{name}Response><{name}Result><Credentials><AccessKeyId>{ACCESS_KEY}</AccessKeyId><SecretAccessKey>"
            f"{SECRET_KEY}</SecretAccessKey><SessionToken></SessionToken><Expiration>{until}</Expiration></Credentials>"
            f"</{name}Result></{name}Response>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def test_a_pod_s_own_identity_renews_itself_from_its_token_s_file(
    gateway: Gateway, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Sts.tokens = []
    token = tmp_path / "token"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Sts) as sts:
        threading.Thread(target=sts.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{sts.server_port}")
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
        storage = _open(gateway.endpoint, bucket)
        for text in ("first", "second"):
            token.write_text(text)
            storage.write(text, b"x")
        sts.shutdown()
    assert {"first", "second"} <= set(_Sts.tokens)
