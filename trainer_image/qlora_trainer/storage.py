"""Object storage: S3, or a local folder for `qlora run`. The only module that touches boto3.

Errors leave here as StepErrors that name the field to look at. Their messages are ours: botocore's may carry an access
key's id.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol
from urllib.parse import urlsplit

from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.spec import OutputSpec

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

DELETE_BATCH = 1000
"""S3's limit for one DeleteObjects."""
DENIED = frozenset(
    {
        "AccessDenied",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "XAdminUserNotFound",  # VersityGW's word for an unknown access key, with status 404
    }
)
MISSING_BUCKET = frozenset({"NoSuchBucket"})
MISSING_KEY = frozenset({"NoSuchKey", "NotFound", "404"})
WRONG_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object below a storage's prefix."""

    key: str
    bytes: int
    tag: str
    """Changes with the content: S3's ETag, or size and time of a local file."""


class Storage(Protocol):
    """A prefix in a bucket, or a folder. Keys are relative to it, with slashes."""

    uri: str

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Objects whose key starts with `prefix`, in order of key."""

    def read(self, key: str) -> bytes | None:
        """Content of a small object; None when there is none."""

    def write(self, key: str, content: bytes) -> None:
        """Create or replace an object, atomically."""

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file, which appears when it is whole."""

    def upload(self, path: Path, key: str) -> None:
        """Copy a local file to an object, which appears when it is whole."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that aren't there are none of our business."""

    def within(self, prefix: str) -> Storage:
        """The storage below a prefix of this one."""


def open_storage(uri: str, output: OutputSpec, *, field: str) -> Storage:
    """The storage at an s3:// or file:// URI. Endpoint, region and credentials are those of spec.output.

    `field` is the one that named the URI, for messages.
    """
    uri = uri.rstrip("/")
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return LocalStorage(Path(parts.path), uri)
    return S3Storage(_client(output), parts.netloc, parts.path.strip("/"), _Blame(field, output))


class LocalStorage:
    """A folder on this machine."""

    def __init__(self, root: Path, uri: str) -> None:
        self.uri = uri
        self._root = root

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Storage."""
        for path in sorted(self._root.rglob("*")):
            key = path.relative_to(self._root).as_posix()
            if key.startswith(prefix) and path.is_file() and not path.name.endswith(".partial"):
                stat = path.stat()
                yield StoredObject(key, stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}")

    def read(self, key: str) -> bytes | None:
        """See Storage."""
        try:
            return (self._root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, key: str, content: bytes) -> None:
        """See Storage."""
        with _appearing(self._root / key) as partial:
            partial.write_bytes(content)

    def download(self, key: str, path: Path) -> None:
        """See Storage."""
        with _appearing(path) as partial:
            shutil.copyfile(self._root / key, partial)

    def upload(self, path: Path, key: str) -> None:
        """See Storage."""
        with _appearing(self._root / key) as partial:
            shutil.copyfile(path, partial)

    def delete(self, keys: Iterable[str]) -> None:
        """See Storage. Folders that become empty go too, as they would in S3."""
        for key in keys:
            path = self._root / key
            path.unlink(missing_ok=True)
            folder = path.parent
            while folder != self._root and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
                folder = folder.parent

    def within(self, prefix: str) -> LocalStorage:
        """See Storage."""
        return LocalStorage(self._root / prefix, f"{self.uri}/{prefix}")


class S3Storage:
    """A prefix in an S3 bucket."""

    def __init__(self, client: S3Client, bucket: str, prefix: str, blame: _Blame) -> None:
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client, self._bucket, self._prefix, self._blame = client, bucket, prefix, blame

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Storage."""
        start = self._key("")
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=start + prefix)
        with self._translated("list"):
            for page in pages:
                for item in page.get("Contents", []):
                    yield StoredObject(item["Key"][len(start) :], item["Size"], item["ETag"].strip('"'))

    def read(self, key: str) -> bytes | None:
        """See Storage."""
        from botocore.exceptions import ClientError

        with self._translated("read"):
            try:
                return self._client.get_object(Bucket=self._bucket, Key=self._key(key))["Body"].read()
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in MISSING_KEY:
                    return None
                raise

    def write(self, key: str, content: bytes) -> None:
        """See Storage."""
        with self._translated("write"):
            self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=content)

    def download(self, key: str, path: Path) -> None:
        """See Storage."""
        with self._translated("read"), _appearing(path) as partial:
            self._client.download_file(self._bucket, self._key(key), str(partial))

    def upload(self, path: Path, key: str) -> None:
        """See Storage."""
        with self._translated("write"):
            self._client.upload_file(str(path), self._bucket, self._key(key))

    def delete(self, keys: Iterable[str]) -> None:
        """See Storage."""
        pending = [self._key(key) for key in keys]
        with self._translated("delete"):
            for start in range(0, len(pending), DELETE_BATCH):
                batch = pending[start : start + DELETE_BATCH]
                if len(batch) == 1:  # the one call that every S3 server has
                    self._client.delete_object(Bucket=self._bucket, Key=batch[0])
                else:
                    objects = {"Objects": [{"Key": key} for key in batch], "Quiet": True}
                    self._client.delete_objects(Bucket=self._bucket, Delete=objects)  # type: ignore[arg-type]

    def within(self, prefix: str) -> S3Storage:
        """See Storage."""
        return S3Storage(self._client, self._bucket, self._key(prefix), self._blame)

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    @contextmanager
    def _translated(self, action: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            self._blame.server(error, self._bucket, action)
        except Boto3Error as error:  # a transfer that failed wraps the server's answer
            if isinstance(error.__context__, ClientError):
                self._blame.server(error.__context__, self._bucket, action)
            self._blame.client(error)
        except BotoCoreError as error:
            self._blame.client(error)


@dataclass(frozen=True, slots=True)
class _Blame:
    """Turns botocore's errors into ours, with the field that a user has to look at."""

    field: str
    output: OutputSpec

    def server(self, error: Exception, bucket: str, action: str) -> NoReturn:
        """An answer of the server that isn't the wanted one."""
        response = getattr(error, "response", {})
        code = str(response.get("Error", {}).get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in MISSING_BUCKET:
            message = f"{self.field}: there is no bucket {bucket} at {self._endpoint}; create it, or correct the name"
            raise StepError(Reason.BUCKET_NOT_FOUND, message, field=self.field) from None
        if code in DENIED or status in (401, 403):
            message = self._denied(code, bucket, action)
            raise StepError(Reason.ACCESS_DENIED, message, field="output.credentialsSecretRef") from None
        if code in WRONG_REGION or status == 301:
            message = f"output.region: bucket {bucket} isn't in region {self.output.region or '(the default)'}"
            raise StepError(Reason.INVALID_SPEC, message, field="output.region") from None
        message = f"{self._endpoint} answered {code or status} when asked to {action} in bucket {bucket}"
        raise StepError(Reason.STORAGE_UNAVAILABLE, message, field=self.field, code=ExitCode.TRANSIENT) from None

    def client(self, error: Exception) -> NoReturn:
        """No answer at all: no credentials to ask with, or nobody there."""
        from botocore.exceptions import NoCredentialsError, ParamValidationError, PartialCredentialsError

        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            message = (
                "output.credentialsSecretRef: there are no complete S3 credentials; name a Secret with "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the ServiceAccount an identity"
            )
            raise StepError(Reason.CREDENTIALS_MISSING, message, field="output.credentialsSecretRef") from None
        if isinstance(error, ParamValidationError):
            message = f"{self.field}: S3 doesn't allow this name"
            raise StepError(Reason.INVALID_SPEC, message, field=self.field) from None
        message = f"output.endpoint: {self._endpoint} can't be reached ({type(error).__name__}); check URL and network"
        raise StepError(
            Reason.ENDPOINT_UNREACHABLE, message, field="output.endpoint", code=ExitCode.TRANSIENT
        ) from None

    @property
    def _endpoint(self) -> str:
        return self.output.endpoint or "AWS S3"

    def _denied(self, code: str, bucket: str, action: str) -> str:
        secret = self.output.credentials_secret_ref
        whose = f"the credentials in Secret {secret.name}" if secret else "the pod's own identity"
        return (
            f"output.credentialsSecretRef: {self._endpoint} refuses {whose} ({code or 'access denied'}) "
            f"when asked to {action} in bucket {bucket}"
        )


def _client(output: OutputSpec) -> S3Client:
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 4},
        s3={"addressing_style": "path"} if output.endpoint else {},
        # Servers that aren't AWS don't all know the newer checksums; ours are SHA-256 in the manifest.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = output.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    try:
        return boto3.session.Session().client("s3", endpoint_url=output.endpoint, region_name=region, config=config)
    except ValueError:
        message = f"output.endpoint: {output.endpoint} isn't the URL of a server"
        raise StepError(Reason.INVALID_SPEC, message, field="output.endpoint") from None


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes it when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
