"""A file into S3: in parts, each with its SHA-256, all or nothing.

Not boto3's upload_file: that can't complete an upload on condition that nobody else wrote the object meanwhile, doesn't
tell the object's tag, and sends its checksums in trailers over TLS, which not every S3 server reads.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

logger = logging.getLogger(__name__)
T = TypeVar("T")

PART_BYTES = 16 << 20
"""A file up to this size is sent at once. What is sent again when a connection breaks."""
MAX_PARTS = 10_000
"""S3's limit."""
AT_ONCE = 4
"""Parts under way, and in memory."""


def put_file(client: S3Client, bucket: str, key: str, path: Path, condition: dict[str, Any]) -> str:
    """Upload a file; the object's new tag. `condition` is IfMatch or IfNoneMatch, or empty.

    Raises what boto3 raises. A failed upload leaves no parts behind, unless the server can't be reached any more.
    """
    size = path.stat().st_size
    if size <= PART_BYTES:
        return put_bytes(client, bucket, key, path.read_bytes(), condition)
    with _upload(client, bucket, key) as upload_id:

        def put(number: int, content: bytes) -> CompletedPartTypeDef:
            checksum = _checksum(content)
            answer = client.upload_part(
                Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=content, ChecksumSHA256=checksum
            )
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}

        parts = _in_parts(path, size, put)
        done = client.complete_multipart_upload(
            Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}, **condition
        )
    return done["ETag"].strip('"')


def put_bytes(client: S3Client, bucket: str, key: str, content: bytes, condition: dict[str, Any]) -> str:
    """Upload a small object; its new tag."""
    answer = client.put_object(Bucket=bucket, Key=key, Body=content, ChecksumSHA256=_checksum(content), **condition)
    return answer["ETag"].strip('"')


@contextmanager
def _upload(client: S3Client, bucket: str, key: str) -> Iterator[str]:
    """A multipart upload's id. It is aborted unless the block ends well, Stopped included."""
    upload_id = client.create_multipart_upload(Bucket=bucket, Key=key, ChecksumAlgorithm="SHA256")["UploadId"]
    try:
        yield upload_id
    except BaseException:
        try:
            client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
        except (ClientError, BotoCoreError):
            logger.warning("the parts of %s can't be dropped now; the next start of this run does", key)
        raise


def _in_parts(path: Path, size: int, put: Callable[[int, bytes], T]) -> list[T]:
    """Call `put` with each part's number, from 1, and content, a few at a time."""
    part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))

    def read_and_put(number: int) -> T:
        with path.open("rb") as file:
            file.seek((number - 1) * part_bytes)
            content = file.read(part_bytes)
        return put(number, content)

    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="upload")
    try:
        return list(pool.map(read_and_put, range(1, -(-size // part_bytes) + 1)))
    finally:
        pool.shutdown(cancel_futures=True)


def _checksum(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()
