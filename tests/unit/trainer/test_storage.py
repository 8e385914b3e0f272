"""Storage: a local folder, and what the answers of an S3 server mean to a user."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qlora_trainer.storage import ABSENT, LocalStorage, Overtaken, Storage, open_storage
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.spec import OutputSpec
from tests.unit.trainer.gateway import Gateway

KEY_ID, SECRET = "AKIDEXAMPLE0123456789", "do-not-tell-anybody-this"


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Empty storage of each kind: what the commands rely on holds for both."""
    if request.param == "folder":
        return LocalStorage(tmp_path / "root", "file:///root")
    gateway: Gateway = request.getfixturevalue("gateway")
    return open_storage(f"{gateway.bucket()}/team", gateway.output("s3://unused"), field="output.uri")


def test_what_is_written_can_be_read(storage: Storage) -> None:
    storage.write("a/b.json", b"{}")
    assert storage.read("a/b.json") == b"{}"


def test_writing_again_replaces(storage: Storage) -> None:
    storage.write("a", b"old")
    storage.write("a", b"new")
    assert storage.read("a") == b"new"


def test_a_missing_object_reads_as_none(storage: Storage) -> None:
    assert storage.read("nothing") is None


def test_list_is_sorted_and_starts_with_the_prefix(storage: Storage) -> None:
    for key in ("b/2", "b/1", "a/1", "bc"):
        storage.write(key, b"x")
    assert [item.key for item in storage.list("b/")] == ["b/1", "b/2"]


def test_a_list_is_complete_beyond_a_page(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: storage.write(f"many/{number:04}", b""), range(1001)))
    assert len(list(storage.list("many/"))) == 1001


def test_an_empty_storage_lists_nothing(storage: Storage) -> None:
    assert list(storage.list()) == []


def test_a_listed_object_has_its_size_and_a_tag_that_follows_the_content(storage: Storage) -> None:
    storage.write("a", b"one")
    (before,) = storage.list()
    storage.write("a", b"four")
    (after,) = storage.list()
    assert (before.bytes, after.bytes) == (3, 4)
    assert before.tag != after.tag


def test_a_file_survives_the_way_up_and_down(storage: Storage, tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000  # more than one part of a multipart upload
    (tmp_path / "up").write_bytes(content)
    storage.upload(tmp_path / "up", "model/weights")
    storage.download("model/weights", tmp_path / "new" / "down")
    assert (tmp_path / "new" / "down").read_bytes() == content


def test_a_download_that_fails_leaves_no_file(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.download("nothing", tmp_path / "new" / "down")
    assert list((tmp_path / "new").iterdir()) == []


def test_deleting_takes_what_is_there_and_nothing_else(storage: Storage) -> None:
    for key in ("keep", "a/b/c", "a/d"):
        storage.write(key, b"x")
    storage.delete(["a/b/c", "a/d", "a/was-never-there"])
    assert [item.key for item in storage.list()] == ["keep"]


def test_a_prefix_is_a_storage_too(storage: Storage) -> None:
    storage.within("run").write("manifest.json", b"{}")
    assert storage.read("run/manifest.json") == b"{}"
    assert storage.within("run").uri == f"{storage.uri}/run"


def test_a_folder_that_becomes_empty_goes(tmp_path: Path) -> None:
    local = LocalStorage(tmp_path / "root", "file:///root")
    local.write("keep", b"x")
    local.write("a/b/c", b"x")
    local.delete(["a/b/c"])
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["keep"]


class _Server(ThreadingHTTPServer):
    """Answers everything with one S3 error."""

    status, code = 403, "AccessDenied"
    requests = 0


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.requests += 1
        body = f"<Error><Code>{self.server.code}</Code><Message>{KEY_ID} {SECRET}</Message></Error>".encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_DELETE = do_GET  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def server(_credentials: None) -> Iterator[_Server]:
    server = _Server(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def _s3(endpoint: str) -> Storage:
    fields = {"uri": "s3://results/team", "endpoint": endpoint, "credentialsSecretRef": {"name": "s3-credentials"}}
    return open_storage("s3://results/team", OutputSpec.model_validate(fields), field="output.uri")


@pytest.mark.parametrize(
    ("status", "code", "reason", "field", "exit_code"),
    [
        (404, "NoSuchBucket", Reason.BUCKET_NOT_FOUND, "output.uri", ExitCode.INVALID),
        (403, "AccessDenied", Reason.ACCESS_DENIED, "output.credentialsSecretRef", ExitCode.INVALID),
        (403, "InvalidAccessKeyId", Reason.ACCESS_DENIED, "output.credentialsSecretRef", ExitCode.INVALID),
        (403, "SignatureDoesNotMatch", Reason.ACCESS_DENIED, "output.credentialsSecretRef", ExitCode.INVALID),
        (301, "PermanentRedirect", Reason.INVALID_SPEC, "output.region", ExitCode.INVALID),
        (418, "Teapot", Reason.STORAGE_UNAVAILABLE, "output.uri", ExitCode.TRANSIENT),
    ],
)
def test_an_answer_of_the_server_names_the_field_to_look_at(
    server: _Server, status: int, code: str, reason: Reason, field: str, exit_code: ExitCode
) -> None:
    server.status, server.code = status, code
    with pytest.raises(StepError) as refused:
        list(_s3(f"http://127.0.0.1:{server.server_port}").list())
    assert (refused.value.reason, refused.value.field, refused.value.code) == (reason, field, exit_code)
    assert refused.value.message.startswith((field, "http://"))


@pytest.mark.parametrize("action", ["read", "write", "upload", "download", "delete"])
def test_no_message_tells_a_credential(server: _Server, tmp_path: Path, action: str) -> None:
    storage = _s3(f"http://127.0.0.1:{server.server_port}")
    (tmp_path / "file").write_bytes(b"x")
    calls = {
        "read": lambda: storage.read("key"),
        "write": lambda: storage.write("key", b"x"),
        "upload": lambda: storage.upload(tmp_path / "file", "key"),
        "download": lambda: storage.download("key", tmp_path / "other"),
        "delete": lambda: storage.delete(["key"]),
    }
    with pytest.raises(StepError) as refused:
        calls[action]()
    assert KEY_ID not in str(refused.value)
    assert SECRET not in str(refused.value)
    assert "Secret s3-credentials" in str(refused.value)


def test_a_missing_object_in_s3_reads_as_none(server: _Server) -> None:
    server.status, server.code = 404, "NoSuchKey"
    assert _s3(f"http://127.0.0.1:{server.server_port}").read("key") is None


def test_a_busy_server_is_asked_again_and_then_reported_as_transient(server: _Server) -> None:
    server.status, server.code = 503, "SlowDown"
    with pytest.raises(StepError) as refused:
        _s3(f"http://127.0.0.1:{server.server_port}").read("key")
    assert refused.value.code is ExitCode.TRANSIENT
    assert server.requests == 4


@pytest.mark.usefixtures("_credentials")
def test_an_unreachable_endpoint_is_transient_and_named() -> None:
    with pytest.raises(StepError, match=r"output.endpoint: http://127.0.0.1:9 can't be reached") as refused:
        _s3("http://127.0.0.1:9").write("key", b"x")
    assert (refused.value.reason, refused.value.code) == (Reason.ENDPOINT_UNREACHABLE, ExitCode.TRANSIENT)


def test_missing_credentials_are_named(server: _Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(StepError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as refused:
        _s3(f"http://127.0.0.1:{server.server_port}").read("key")
    assert (refused.value.reason, refused.value.field) == (
        Reason.CREDENTIALS_MISSING,
        "output.credentialsSecretRef",
    )


# Conditions


def _tag(storage: Storage, key: str) -> str:
    return next(item.tag for item in storage.list() if item.key == key)


def test_what_must_not_be_there_is_not_written_over(storage: Storage) -> None:
    storage.write("a", b"first", over=ABSENT)
    with pytest.raises(Overtaken):
        storage.write("a", b"second", over=ABSENT)
    assert storage.read("a") == b"first"


def test_only_the_version_that_was_looked_at_is_written_over(storage: Storage) -> None:
    looked_at = storage.write("a", b"one")
    storage.write("a", b"another's")
    with pytest.raises(Overtaken):
        storage.write("a", b"two", over=looked_at)
    storage.write("a", b"three", over=_tag(storage, "a"))
    assert storage.read("a") == b"three"


def test_what_is_gone_is_not_written_over(storage: Storage) -> None:
    looked_at = storage.write("a", b"one")
    storage.delete(["a"])
    with pytest.raises(Overtaken):
        storage.write("a", b"two", over=looked_at)


@pytest.mark.parametrize("size", [10, 12 << 20], ids=["small", "in parts"])
def test_conditions_hold_for_files_too(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("qlora_trainer.s3.upload.PART_BYTES", 5 << 20)
    (tmp_path / "file").write_bytes(b"x" * size)
    tag = storage.upload(tmp_path / "file", "a", over=ABSENT)
    assert tag == _tag(storage, "a")
    with pytest.raises(Overtaken):
        storage.upload(tmp_path / "file", "a", over=ABSENT)
    storage.upload(tmp_path / "file", "a", over=tag)
    assert storage.abort_uploads() == 0


def test_a_writer_s_own_tag_is_the_one_that_is_listed(storage: Storage) -> None:
    assert storage.write("a", b"content") == _tag(storage, "a")


def test_what_a_killed_copy_left_is_dropped(tmp_path: Path) -> None:
    local = LocalStorage(tmp_path / "root", "file:///root")
    local.write("keep", b"x")
    local.write("a/.b.123.partial", b"half")
    assert local.abort_uploads() == 1
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["keep"]


def test_a_server_without_conditions_is_written_to_all_the_same(server: _Server) -> None:
    server.status, server.code = 501, "NotImplemented"
    with pytest.raises(StepError):
        _s3(f"http://127.0.0.1:{server.server_port}").write("key", b"x", over=ABSENT)
    assert server.requests == 2  # the second without the condition; this server refuses that, too
