"""Hold a run in S3 against its own manifest: every file there, with the size and the SHA-256 that it should have."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from qlorajob.manifest import LATEST, MANIFEST, REPORT, ArtifactManifest, Latest


class VerificationError(Exception):
    """What is in S3 isn't what the manifest says."""


@dataclass(frozen=True)
class VerifiedRun:
    """A run whose every file was read back and found right."""

    prefix: str
    manifest: ArtifactManifest
    report: dict[str, Any]


def verify_run(s3: Any, output_uri: str, run_id: str) -> VerifiedRun:
    """Read <output_uri>/<run_id>/ back from S3 and check it.

    Raises:
        VerificationError: a file is missing, unlisted or different, or latest.json doesn't point at this run.
    """
    uri = urlsplit(output_uri)
    bucket, root = uri.netloc, uri.path.strip("/")
    prefix = f"{root}/{run_id}"
    manifest = ArtifactManifest.model_validate_json(_read(s3, bucket, f"{prefix}/{MANIFEST}"))
    for file in manifest.files:
        content = _read(s3, bucket, f"{prefix}/{file.path}")
        if len(content) != file.bytes or hashlib.sha256(content).hexdigest() != file.sha256:
            raise VerificationError(f"{prefix}/{file.path} is not what the manifest lists")
    present = {key.removeprefix(f"{prefix}/") for key in list_keys(s3, bucket, f"{prefix}/")}
    unlisted = present - {file.path for file in manifest.files} - {MANIFEST}
    if unlisted:
        raise VerificationError(f"{prefix} holds files that its manifest doesn't list: {sorted(unlisted)}")
    latest = Latest.model_validate_json(_read(s3, bucket, f"{root}/{LATEST}"))
    if manifest.promoted is not False and latest.run_id != run_id:
        raise VerificationError(f"{LATEST} points at run {latest.run_id}, not at {run_id}")
    return VerifiedRun(prefix, manifest, json.loads(_read(s3, bucket, f"{prefix}/{REPORT}")))


def list_keys(s3: Any, bucket: str, prefix: str) -> dict[str, int]:
    """Keys and sizes below a prefix."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}


def _read(s3: Any, bucket: str, key: str) -> bytes:
    try:
        return bytes(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
    except s3.exceptions.NoSuchKey:
        raise VerificationError(f"s3://{bucket}/{key} is missing") from None
