"""Install the operator with its chart, as `make cluster-up` leaves it: ready for `kubectl apply`."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from cluster import images, layout
from cluster.layout import DEV
from cluster.shell import ClusterError, step
from demo.seed import seed
from demo.target import Target

RELEASE = "qlora-operator"
LOCAL_VALUES = DEV / "demo" / "values-local.yaml"
"""Mounts this clone's Python environment into the thin trainer image."""


def install(target: Target) -> None:
    """Build and load the operator's image (local cluster), install the chart, and seed what the quickstart needs."""
    image = target.operator_image or _operator_image(target)
    repository, _, tag = image.rpartition(":")
    trainer_repository, _, trainer_tag = target.trainer_image.rpartition(":")
    values = {
        "image.repository": repository,
        "image.tag": tag,
        "trainer.image.repository": trainer_repository,
        "trainer.image.tag": trainer_tag,
    }
    chart = target.layout.repository / "charts" / "qlora-operator"
    with step("operator (helm)"):
        # helm installs what is in crds/ once and never updates it; while developing, the schema changes daily.
        target.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(chart / "crds"))
        _helm(
            target,
            *("upgrade", "--install", RELEASE, str(chart), "--namespace", target.operator_namespace),
            *("--create-namespace", "--wait", "--timeout", "2m"),
            *(("--values", str(LOCAL_VALUES)) if target.is_local else ()),
            *(argument for name, value in values.items() for argument in ("--set-string", f"{name}={value}")),
        )
    seed(target, sys.executable)


def _helm(target: Target, *arguments: str) -> None:
    """Run helm; when it fails, show why the operator's pods aren't ready instead of "deadline exceeded" alone."""
    try:
        target.helm(*arguments)
    except ClusterError as error:
        scope = ("-n", target.operator_namespace)
        logs = ("logs", f"deployment/{RELEASE}", "--tail=20", "--all-pods", "--ignore-errors")
        raise ClusterError(f"{error}\n{target.kubectl(*scope, 'get', 'pods')}{target.kubectl(*scope, *logs)}") from None


def _operator_image(target: Target) -> str:
    """The operator's image of these sources, built and loaded unless the cluster has it. Its tag names its content."""
    repository = target.layout.repository
    tag = f"{layout.OPERATOR_IMAGE.rpartition(':')[0]}:{_digest(repository)}"
    stamp = target.layout.state / "imported" / tag.replace("/", "_")
    if not stamp.exists():
        images.ensure_base()
        with step("image of the operator (buildah)"):
            images.build(repository, repository / "Dockerfile", tag, {"BASE_IMAGE": layout.BASE_IMAGE})
        with step("loading it into the cluster"):
            images.load(target.layout, tag)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    return tag


def _digest(repository: Path) -> str:
    """12 hex digits over everything that goes into the operator's image."""
    files = [repository / "Dockerfile", repository / "requirements" / "operator.txt"]
    files += sorted((repository / "operator").rglob("*.py"))
    content = hashlib.sha256()
    for file in files:
        content.update(str(file.relative_to(repository)).encode() + b"\0" + file.read_bytes())
    return content.hexdigest()[:12]
