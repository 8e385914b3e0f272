"""What a job stands on gives way under it: credentials change, disks fill up, memory runs out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from cluster.layout import Layout
from cluster.shell import run
from tests.chaos.cell import SAVE_STEPS, Cell
from tests.chaos.faults import Faults
from tests.chaos.history import Version
from tests.chaos.ledger import LEDGER
from tests.support.faulty_s3 import refuse_key
from tests.support.identities import Identity, identity
from tests.support.live import eventually, write_s3_secret

pytestmark = [pytest.mark.cluster, pytest.mark.long]

STEP = {"preparing": "prepare", "training": "train", "merging": "merge"}


# Credentials


@pytest.fixture
def old(cell: Cell) -> Identity:
    """Keys of an S3 user, in a Secret of this cell's own."""
    made = identity(cell.namespace.cluster, "old")
    write_s3_secret(cell.namespace, cell.name, **made.values())
    return made


@pytest.mark.parametrize("phase", STEP)
def test_secret_rotated(cell: Cell, old: Identity, phase: str) -> None:
    """The old keys end as soon as the new ones are in the pod; it goes on with those, without another pod."""
    with cell.at(phase, {"output": {"credentialsSecretRef": {"name": cell.name}}}):
        pod = cell.pod_of(STEP[phase])
        LEDGER.faults += 1
        new = identity(cell.namespace.cluster, "new")
        write_s3_secret(cell.namespace, cell.name, **new.values())
        # The kubelet looks at a pod's volumes once a minute, or when the pod changes.
        cell.namespace.kubectl("annotate", "pod", pod.raw["metadata"]["name"], "chaos=looked-at")
        file = _volume(cell.namespace.cluster.layout, pod, "secret/s3-credentials") / "AWS_ACCESS_KEY_ID"
        eventually(lambda: file.read_text() == new.access_key, 90, "the new keys are mounted")
        cell.storage.inject(refuse_key(old.access_key))
    cell.check()
    assert [other.name for other in cell.pods(STEP[phase])] == [pod.raw["metadata"]["name"]]


# Disks


@pytest.fixture
def small_cache(cell: Cell, tmp_path: Path) -> Iterator[Path]:
    """A claim on a volume of a few megabytes."""
    disk = tmp_path / "cache"
    with _small_disk(disk, "4m"):
        metadata, modes = {"name": f"cache-{cell.name}"}, ["ReadWriteOnce"]
        room = {"storage": "1Gi"}
        claim = {"namespace": cell.namespace.name, "name": "cache"}
        volume = {"capacity": room, "accessModes": modes, "hostPath": {"path": str(disk)}, "claimRef": claim}
        spec = {"accessModes": modes, "resources": {"requests": room}, "volumeName": metadata["name"]}
        for kind, meta, body in (
            ("PersistentVolume", metadata, volume),
            ("PersistentVolumeClaim", {"name": "cache"}, spec),
        ):
            body["storageClassName"] = ""
            cell.namespace.apply({"apiVersion": "v1", "kind": kind, "metadata": meta, "spec": body})
        yield disk
        cell.namespace.kubectl("delete", "pvc", "cache", "--ignore-not-found", "--wait=false")
        cell.namespace.kubectl("delete", "pv", metadata["name"], "--ignore-not-found", "--wait=false")


def test_disk_full_while_preparing(cell: Cell, small_cache: Path) -> None:
    """The volume for weights has no room for them, until somebody makes some."""
    LEDGER.faults += 1
    cell.apply({"model": {"cacheClaim": "cache"}})
    cell.until(lambda: any(_reason(cell, "prepare")), "prepare has met the full disk")
    assert _reason(cell, "prepare")[0] == "DiskFull"
    run(["mount", "-o", "remount,size=256m", str(small_cache)])
    cell.check()


def test_disk_full_while_training(cell: Cell) -> None:
    """The node's disk fills up under the first pod; the next finds room."""
    write_s3_secret(cell.namespace, cell.name, **cell.namespace.cluster.target.credentials)
    with cell.at("queued", {"output": {"credentialsSecretRef": {"name": cell.name}}}):
        cell.namespace.kubectl("delete", "secret", cell.name)  # so that the pod has volumes, but doesn't start yet
    pod = cell.until(lambda: _unconfigured(cell), "the pod waits for its Secret")
    work = _volume(cell.namespace.cluster.layout, pod, "empty-dir/work")
    with _small_disk(work, "64m"), cell.storage.holding(r"GET \S+/data/rows\.jsonl") as arrived:
        write_s3_secret(cell.namespace, cell.name, **cell.namespace.cluster.target.credentials)
        assert arrived.wait(120), cell.namespace.story(cell.name)
        LEDGER.faults += 1
        _fill(work)
    cell.check()
    assert _reason(cell, "train") == ["DiskFull", "Succeeded"]


# Memory

SMALL_GPU = """
import importlib.abc, importlib.util, sys

class SmallGpu(importlib.abc.MetaPathFinder):
    # After the fifth step there is memory for one row at a time.
    def find_spec(self, name, path, target=None):
        if name != "qlora_trainer.training":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            plain = module.Trainer.training_step

            def training_step(self, model, inputs, *rest, **named):
                if self.state.global_step >= 5 and len(inputs["input_ids"]) > 1:
                    raise module.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
                return plain(self, model, inputs, *rest, **named)

            module.Trainer.training_step = training_step

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, SmallGpu())
"""
"""A `sitecustomize` module. The GPU itself is a label; QLORA_DEVICE=cpu lets the trainer run without it."""


@pytest.fixture
def small_gpu(cell: Cell, faults: Faults) -> Iterator[None]:
    """Trainers whose GPU is too small, in this cell's namespace; and nothing is learnt from them for later."""
    metadata = {"name": "small-gpu"}
    files = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"sitecustomize.py": SMALL_GPU}}
    cell.namespace.apply(files)
    before, known = faults.operator_config(), faults.observations()
    config = YAML(typ="safe").load(before)
    path = next(variable for variable in config["extraEnv"] if variable["name"] == "PYTHONPATH")
    path["value"] = f"/opt/small-gpu:{path['value']}"
    config["extraEnv"].append({"name": "QLORA_DEVICE", "value": "cpu"})
    config["extraVolumes"].append({"name": "small-gpu", "configMap": metadata})
    config["extraVolumeMounts"].append({"name": "small-gpu", "mountPath": "/opt/small-gpu", "readOnly": True})
    faults.set_operator_config(json.dumps(config))
    yield
    cell.namespace.kubectl("delete", "configmap", "small-gpu")
    faults.set_observations(known)
    faults.set_operator_config(before)


def test_out_of_gpu_memory(cell: Cell, small_gpu: None) -> None:
    """Goes on from the last checkpoint with half the micro batch, and the same batch."""
    LEDGER.faults += 1
    cell.apply({"resources": {"gpuClass": "L4"}, "training": {"seed": 65}})
    report = cell.check(config_maps=["small-gpu"])
    assert _reason(cell, "train") == ["OutOfMemory", "Succeeded"]
    assert report["training"]["resumedAt"] == [2 * SAVE_STEPS]
    plan = cell.ended["plan"]
    assert (plan["microBatchSize"], plan["gradientAccumulation"]) == (1, 2)


@contextmanager
def _small_disk(place: Path, size: str) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=1777", "tmpfs", str(place)])
    try:
        yield
    finally:
        run(["umount", "--lazy", str(place)])


def _fill(place: Path) -> None:
    free = shutil.disk_usage(place).free
    (place / "full").write_bytes(bytes(free))


def _unconfigured(cell: Cell) -> Version | None:
    for pod in cell.history.now(cell.name, "Pod", "train"):
        for container in pod.status.get("containerStatuses") or ():
            if container["state"].get("waiting", {}).get("reason") == "CreateContainerConfigError":
                return pod
    return None


def _reason(cell: Cell, step: str) -> list[str]:
    """How the step's pods ended, oldest first."""
    return [str(pod.report.reason) for pod in cell.pods(step) if pod.report]


def _volume(layout: Layout, pod: Version, volume: str) -> Path:
    """Where the kubelet keeps a pod's volume."""
    return layout.kubelet_root / "pods" / pod.uid / "volumes" / f"kubernetes.io~{volume}"
