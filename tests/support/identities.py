"""Users of the local cluster's S3 server, with keys of their own."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from cluster.binaries import VERSITYGW
from cluster.shell import run
from tests.support.live import Cluster


@dataclass(frozen=True)
class Identity:
    """Keys that the server accepts."""

    access_key: str
    secret_key: str

    def values(self) -> dict[str, str]:
        """As a Secret holds them."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}


def identity(cluster: Cluster, name: str) -> Identity:
    """A new user who may do everything with every bucket."""
    made = Identity(f"{name}-{secrets.token_hex(8)}", secrets.token_hex(20))
    target = cluster.target
    root = (
        "--access",
        target.credentials["AWS_ACCESS_KEY_ID"],
        "--secret",
        target.credentials["AWS_SECRET_ACCESS_KEY"],
    )
    user = ("--access", made.access_key, "--secret", made.secret_key, "--role", "admin")
    run([VERSITYGW.cached, "admin", *root, "--endpoint-url", target.host_endpoint, "create-user", *user])
    return made
