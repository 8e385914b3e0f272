"""The S3 client: time-outs, retries, and credentials that may change while it is in use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import botocore.loaders
import botocore.session
from botocore.config import Config
from botocore.credentials import CredentialProvider, Credentials, ReadOnlyCredentials

from qlora_trainer import logs
from qlorajob import names
from qlorajob.errors import Reason, StepError
from qlorajob.spec import OutputSpec

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONNECT_SECONDS, READ_SECONDS = 5, 60
ATTEMPTS = 4
"""Of one request, within about a second: for a connection that broke. `patience` waits out what takes longer."""
CONNECTIONS = 16
"""Enough for a checkpoint that is uploaded in parts while something else is downloaded."""

_LOADER = botocore.loaders.create_loader()
"""Parses S3's description once: that is most of what a client costs."""

ACCESS_KEY, SECRET_KEY, TOKEN = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"


def open_client(output: OutputSpec) -> S3Client:
    """A client for spec.output. Raises StepError when the endpoint isn't a URL."""
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        tcp_keepalive=True,
        max_pool_connections=CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        s3={"addressing_style": "path"} if output.endpoint else {},
        # botocore's own checksums go into trailers, which servers that aren't AWS don't all know. `upload` sends
        # SHA-256 in headers, and downloads are held against the SHA-256 in the manifest.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = output.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    session = boto3.session.Session(botocore_session=_session())
    try:
        return session.client("s3", endpoint_url=output.endpoint, region_name=region, config=config)
    except ValueError:
        message = f"output.endpoint: {output.endpoint} isn't the URL of a server"
        raise StepError(Reason.INVALID_SPEC, message, field="output.endpoint") from None


def _session() -> botocore.session.Session:
    """botocore's chain of credentials, with the mounted Secret first."""
    session = botocore.session.get_session()
    session.register_component("data_loader", _LOADER)
    root = Path(os.environ.get(names.ENV_MOUNT_ROOT, names.MOUNT_ROOT))
    folder = root / Path(names.CREDENTIALS_DIR).relative_to(names.MOUNT_ROOT)
    session.get_component("credential_provider").insert_before("env", _MountedProvider(folder))
    return session


class MountedCredentials(Credentials):
    """The keys of a mounted Secret, read anew for each request: the kubelet swaps the files when the Secret changes.

    While a file is missing, the last values hold.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        super().__init__("", "", method=_MountedProvider.METHOD)
        self.get_frozen_credentials()

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """See botocore: what one request is signed with."""
        access_key, secret_key = _read(self._folder / ACCESS_KEY), _read(self._folder / SECRET_KEY)
        if access_key and secret_key:
            self.access_key, self.secret_key, self.token = access_key, secret_key, _read(self._folder / TOKEN)
        return super().get_frozen_credentials()


class _MountedProvider(CredentialProvider):
    METHOD = "mounted-secret"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def load(self) -> Credentials | None:
        """See botocore."""
        credentials = MountedCredentials(self._folder)
        return credentials if credentials.access_key and credentials.secret_key else None


def _read(path: Path) -> str | None:
    """A file's text without the line's end that editors add; None when there is none."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    logs.hide(text)
    return text or None
