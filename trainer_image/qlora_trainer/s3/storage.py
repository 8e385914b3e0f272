"""Storage in an S3 bucket."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from qlora_trainer.s3.errors import MISSING_KEY, OVERTAKEN, WITHOUT_CONDITIONS, Blame, code_of, status_of
from qlora_trainer.s3.upload import put_bytes, put_file
from qlora_trainer.storage import ABSENT, Overtaken, StoredObject, appearing

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

logger = logging.getLogger(__name__)

DELETE_BATCH = 1000
"""S3's limit for one DeleteObjects."""
UNAVAILABLE = frozenset({403, 405, 501})
"""Statuses that say: not with these credentials, or not on this server."""


class S3Storage:
    """A prefix in an S3 bucket. Its methods are those of Storage."""

    def __init__(self, client: S3Client, bucket: str, prefix: str, blame: Blame) -> None:
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
        with self._translated("read"):
            try:
                return self._client.get_object(Bucket=self._bucket, Key=self._key(key))["Body"].read()
            except ClientError as error:
                if code_of(error) in MISSING_KEY:
                    return None
                raise

    def read_start(self, key: str, length: int) -> bytes:
        """See Storage. Of a server that knows no ranges, no more is read either."""
        part = f"bytes=0-{length - 1}"
        with self._translated("read"):
            try:
                with self._client.get_object(Bucket=self._bucket, Key=self._key(key), Range=part)["Body"] as body:
                    return body.read(length)
            except ClientError as error:
                if status_of(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return b""  # an empty object has no such range
                if code_of(error) in MISSING_KEY:
                    raise FileNotFoundError(f"{self.uri}/{key}") from None
                raise

    def write(self, key: str, content: bytes, *, over: str | None = None) -> str:
        """See Storage."""
        return self._put(key, over, partial(put_bytes, self._client, self._bucket, self._key(key), content))

    def download(self, key: str, path: Path) -> None:
        """See Storage."""
        with self._translated("read"), appearing(path) as unfinished:
            try:
                self._client.download_file(self._bucket, self._key(key), str(unfinished))
            except ClientError as error:
                if code_of(error) in MISSING_KEY:
                    raise FileNotFoundError(f"{self.uri}/{key}") from None
                raise

    def upload(self, path: Path, key: str, *, over: str | None = None) -> str:
        """See Storage."""
        return self._put(key, over, partial(put_file, self._client, self._bucket, self._key(key), path))

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

    def abort_uploads(self) -> int:
        """See Storage. Uploads that these credentials or this server don't show are left alone."""
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=self._key(""))
        with self._translated("list uploads"):
            try:
                found = [(item["Key"], item["UploadId"]) for page in pages for item in page.get("Uploads", [])]
            except ClientError as error:
                if status_of(error) not in UNAVAILABLE:
                    raise
                logger.warning("can't look for unfinished uploads below %s: %s", self.uri, code_of(error))
                return 0
        with self._translated("abort uploads"):
            for key, upload_id in found:
                try:
                    self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload_id)
                except ClientError as error:
                    if code_of(error) != "NoSuchUpload":  # its own process was faster
                        raise
        return len(found)

    def within(self, prefix: str) -> S3Storage:
        """See Storage."""
        return S3Storage(self._client, self._bucket, self._key(prefix), self._blame)

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _put(self, key: str, over: str | None, put: Callable[[dict[str, Any]], str]) -> str:
        with self._translated("write"):
            try:
                return put(_condition(over))
            except ClientError as error:
                if over is None or code_of(error) not in OVERTAKEN | MISSING_KEY | WITHOUT_CONDITIONS:
                    raise
                if code_of(error) not in WITHOUT_CONDITIONS:
                    raise Overtaken(f"{self.uri}/{key}") from None
                logger.warning("this S3 server has no conditional writes: two trainers of one run aren't kept apart")
                return put({})

    @contextmanager
    def _translated(self, action: str) -> Iterator[None]:
        try:
            yield
            self._blame.accepted = True
        except ClientError as error:
            self._blame.server(error, self._bucket, action)
        except Boto3Error as error:  # a transfer that failed wraps the server's answer
            if isinstance(error.__context__, ClientError):
                self._blame.server(error.__context__, self._bucket, action)
            self._blame.client(error)
        except BotoCoreError as error:
            self._blame.client(error)


def _condition(over: str | None) -> dict[str, Any]:
    if over is None:
        return {}
    return {"IfNoneMatch": "*"} if over == ABSENT else {"IfMatch": over}
