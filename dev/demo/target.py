"""Where the demo runs: the local cluster of `dev/cluster`, or the user's own when KUBECONFIG says so."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from cluster.layout import OPERATOR_NAMESPACE, THIN_TRAINER_IMAGE, Layout
from cluster.shell import ClusterError, run

IN_CLUSTER_ENDPOINT = "http://s3.qlora-dev.svc:9000"
OWN_CLUSTER_VARIABLES = (
    "OPERATOR_IMAGE",
    "TRAINER_IMAGE",
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
)


@dataclass(frozen=True)
class Target:
    """A cluster, its S3 server, and what to install there."""

    layout: Layout
    kubeconfig: Path
    trainer_image: str
    operator_image: str | None
    """None on the local cluster, where the image is built from the sources."""
    endpoint: str
    """S3 as pods reach it."""
    host_endpoint: str
    """S3 as this machine reaches it."""
    credentials: dict[str, str]
    """AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""
    operator_namespace: str = OPERATOR_NAMESPACE
    namespace: str = "default"

    @property
    def is_local(self) -> bool:
        """Whether this is the cluster that `make cluster-up` started."""
        return self.operator_image is None

    def kubectl(self, *arguments: str, input_text: str | None = None) -> str:
        """Run kubectl against this cluster and return what it printed."""
        return run([self._tool("kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments], input_text=input_text)

    def helm(self, *arguments: str) -> str:
        """Run helm against this cluster and return what it printed."""
        return run([self._tool("helm"), f"--kubeconfig={self.kubeconfig}", *arguments])

    def _tool(self, name: str) -> str:
        """The local cluster's executable, or for the user's own cluster the user's: ours are only made on Debian."""
        found = str(self.layout.bin / name) if self.is_local else shutil.which(name)
        if found is None:
            raise ClusterError(f"{name} is not installed, which the demo needs for the cluster of {self.kubeconfig}")
        return found

    def s3(self) -> Any:
        """A boto3 client for this cluster's S3 server."""
        return boto3.client(
            "s3",
            endpoint_url=self.host_endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.credentials["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.credentials["AWS_SECRET_ACCESS_KEY"],
            config=Config(s3={"addressing_style": "path"}),
        )


def _local(layout: Layout) -> Target:
    if not layout.s3_env.exists():
        raise ClusterError("the local cluster isn't running: run `make cluster-up`")
    values = dict(line.split("=", 1) for line in layout.s3_env.read_text().splitlines())
    return Target(
        layout=layout,
        kubeconfig=layout.kubeconfig,
        trainer_image=THIN_TRAINER_IMAGE,
        operator_image=None,
        endpoint=IN_CLUSTER_ENDPOINT,
        host_endpoint=values["AWS_ENDPOINT_URL"],
        credentials={name: values[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")},
    )


def _own(layout: Layout, kubeconfig: Path) -> Target:
    missing = [name for name in OWN_CLUSTER_VARIABLES if not os.environ.get(name)]
    if missing:
        raise ClusterError(
            f"to run the demo on the cluster of {kubeconfig}, set {', '.join(missing)}: images that the cluster can "
            "pull, and an S3 server that both this machine and the cluster reach (see docs/install.md)"
        )
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    return Target(
        layout=layout,
        kubeconfig=kubeconfig,
        trainer_image=os.environ["TRAINER_IMAGE"],
        operator_image=os.environ["OPERATOR_IMAGE"],
        endpoint=endpoint,
        host_endpoint=endpoint,
        credentials={name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")},
    )


def find() -> Target:
    """The user's cluster when KUBECONFIG names one that isn't the local cluster's, else the local one."""
    layout = Layout()
    named = os.environ.get("KUBECONFIG")
    if named and Path(named).expanduser().resolve() != layout.kubeconfig.resolve():
        return _own(layout, Path(named).expanduser())
    return _local(layout)
