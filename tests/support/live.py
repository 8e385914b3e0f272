"""The real cluster as tests see it: kubectl, S3, and waiting for what should happen instead of sleeping."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from cluster.layout import Layout
from demo.seed import write_secret
from demo.target import Target

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Cluster:
    """The local cluster with the operator installed, as `make cluster-up` leaves it."""

    target: Target

    @property
    def layout(self) -> Layout:
        return self.target.layout

    @property
    def kubeconfig(self) -> Any:
        return self.target.kubeconfig

    def kubectl(self, *arguments: str, input_text: str | None = None) -> str:
        """kubectl as the administrator; fails loudly."""
        return self.target.kubectl(*arguments, input_text=input_text)

    def try_kubectl(self, *arguments: str, input_text: str | None = None) -> subprocess.CompletedProcess[str]:
        """kubectl whose failure is the point of the test."""
        command = [str(self.layout.bin / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]
        return subprocess.run(command, input=input_text, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Namespace:
    """A namespace of one test module, with the S3 credentials and the Python environment that pods need."""

    cluster: Cluster
    name: str

    def kubectl(self, *arguments: str, input_text: str | None = None) -> str:
        return self.cluster.kubectl("-n", self.name, *arguments, input_text=input_text)

    def apply(self, manifest: Manifest) -> None:
        self.kubectl("apply", "-f", "-", input_text=json.dumps(manifest))

    def get(self, kind: str, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", kind, *arguments, "-o", "json"))

    def job(self, name: str) -> Manifest:
        """The QLoRAJob."""
        found: Manifest = self.get("qlj", name)
        return found

    def status(self, name: str) -> Manifest:
        status: Manifest = self.job(name).get("status", {})
        return status

    def condition(self, name: str, kind: str) -> Manifest | None:
        return next((item for item in self.status(name).get("conditions", []) if item["type"] == kind), None)

    def wait(self, name: str, condition: str, seconds: int = 300) -> Manifest:
        """Wait for a condition. Returns the status."""
        return self._wait(name, f"condition={condition}", seconds)

    def wait_for(self, name: str, jsonpath: str, seconds: int = 300) -> Manifest:
        """Wait for a field, such as `{.status.phase}=Training`. Returns the status."""
        return self._wait(name, f"jsonpath={jsonpath}", seconds)

    def _wait(self, name: str, what: str, seconds: int) -> Manifest:
        """`kubectl wait`; on time-out show what the job says of itself."""
        try:
            self.kubectl("wait", f"qlj/{name}", f"--for={what}", f"--timeout={seconds}s")
        except Exception as error:
            raise AssertionError(f"{name}: no {what} after {seconds} s: {self.story(name)}") from error
        return self.status(name)

    def jobs(self, name: str, step: str | None = None) -> list[Manifest]:
        """The batch Jobs of a QLoRAJob."""
        selector = f"qlora.dev/job={name}" + (f",qlora.dev/step={step}" if step else "")
        items: list[Manifest] = self.get("jobs", "-l", selector)["items"]
        return items

    def pods(self, name: str, step: str | None = None) -> list[Manifest]:
        selector = f"qlora.dev/job={name}" + (f",qlora.dev/step={step}" if step else "")
        items: list[Manifest] = self.get("pods", "-l", selector)["items"]
        return items

    def events(self, name: str) -> list[Manifest]:
        """Events about the QLoRAJob, oldest first."""
        selector = f"--field-selector=involvedObject.kind=QLoRAJob,involvedObject.name={name}"
        return sorted(self.get("events", selector)["items"], key=lambda item: item["metadata"]["creationTimestamp"])

    def story(self, name: str) -> str:
        """Everything worth reading when a test failed."""
        pods = self.cluster.try_kubectl("-n", self.name, "describe", "pods", "-l", f"qlora.dev/job={name}").stdout
        logs = self.cluster.try_kubectl("-n", self.name, "logs", "-l", f"qlora.dev/job={name}", "--tail=30").stdout
        return f"{json.dumps(self.status(name), indent=1)}\n{pods[-6000:]}\n{logs[-6000:]}"


def eventually(check: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first truthy answer of `check`. For facts that no watch or `kubectl wait` can tell."""
    deadline = time.monotonic() + seconds
    while True:
        if answer := check():
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.5)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Manifest:
    """`base` with `changes` laid over it, as a JSON merge patch would: None removes."""
    result = deepcopy(dict(base))
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            result[key] = merged(result.get(key) or {}, value)
        else:
            result[key] = deepcopy(value)
    return result


def empty_bucket(cluster: Cluster, bucket: str) -> Any:
    """A boto3 client for the cluster's S3 server, on which the bucket is there and holds nothing."""
    client = cluster.target.s3()
    if bucket not in {found["Name"] for found in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=bucket)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for item in page.get("Contents", []):
            client.delete_object(Bucket=bucket, Key=item["Key"])
    for upload in client.list_multipart_uploads(Bucket=bucket).get("Uploads", []):
        client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    return client


def write_s3_secret(namespace: Namespace, name: str = "s3-credentials", **values: str) -> None:
    """The real credentials as a Secret, or others to be refused."""
    if not values:
        write_secret(namespace.cluster.target, namespace.name, name)
        return
    metadata = {"name": name, "namespace": namespace.name}
    namespace.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": values})
