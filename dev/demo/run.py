"""The main job, shown: apply the quickstart's manifest, watch it train, and look at what is in S3 afterwards."""

from __future__ import annotations

import json
import os
import time
from typing import Any
from urllib.parse import urlsplit

from ruamel.yaml import YAML

from cluster.shell import ClusterError, say
from demo.target import Target
from demo.verify import VerifiedRun, list_keys, verify_run
from qlorajob.status import QLoRAJobStatus

NAME = "demo"
TIMEOUT_SECONDS = 20 * 60


def run(target: Target) -> None:
    """Train, verify and print; the last line is `DEMO OK …`.

    Raises:
        ClusterError: the job failed or didn't end in time.
        VerificationError: S3 doesn't hold what the manifest says.
    """
    manifest = _manifest(target)
    output = manifest["spec"]["output"]["uri"]
    say(f"\n$ kubectl apply -f examples/quickstart.yaml   (as {NAME}, into {output})")
    target.kubectl("-n", target.namespace, "delete", "qlj", NAME, "--ignore-not-found", "--wait")
    target.kubectl("-n", target.namespace, "apply", "-f", "-", input_text=json.dumps(manifest))
    status = _watch(target)
    say("\n$ kubectl get qlj")
    say(target.kubectl("-n", target.namespace, "get", "qlj").rstrip())
    say(f"\n$ kubectl describe qlj {NAME}   (its events)")
    say(_events(target))
    if status.run is None or status.artifacts is None:
        raise ClusterError("the job is Complete, but its status names no run and no artifacts")
    verified = verify_run(target.s3(), output, status.run.id)
    _show_bucket(target, output)
    _show_manifest(verified)
    _show_answers(verified.report)
    say(_last_line(status))


def _manifest(target: Target) -> dict[str, Any]:
    """The quickstart's manifest under another name, with an output of its own so that each demo trains anew."""
    path = target.layout.repository / "examples" / "quickstart.yaml"
    manifest: dict[str, Any] = YAML(typ="safe", pure=True).load(path)
    manifest["metadata"]["name"] = NAME
    output = manifest["spec"]["output"]
    output["uri"] = f"s3://adapters/demo/{time.strftime('%Y%m%d-%H%M%S')}"
    output["endpoint"] = target.endpoint
    return manifest


def _watch(target: Target) -> QLoRAJobStatus:
    """Show progress until the job has ended, through the same code as `qlora watch`."""
    os.environ["KUBECONFIG"] = str(target.kubeconfig)
    from qlora_cli.watch import watch_job

    succeeded = watch_job(NAME, namespace=target.namespace, timeout=TIMEOUT_SECONDS)
    job = json.loads(target.kubectl("-n", target.namespace, "get", "qlj", NAME, "-o", "json"))
    if not succeeded:
        raise ClusterError(f"the demo's job failed:\n{json.dumps(job['status'], indent=2)}")
    return QLoRAJobStatus.model_validate(job["status"])


def _events(target: Target) -> str:
    selector = f"involvedObject.kind=QLoRAJob,involvedObject.name={NAME}"
    columns = "custom-columns=TYPE:.type,REASON:.reason,MESSAGE:.message"
    command = ("get", "events", f"--field-selector={selector}", "--sort-by=.metadata.creationTimestamp", "-o", columns)
    return target.kubectl("-n", target.namespace, *command).rstrip()


def _show_bucket(target: Target, output: str) -> None:
    uri = urlsplit(output)
    say(f"\nIn {output}:")
    for key, size in list_keys(target.s3(), uri.netloc, uri.path.strip("/") + "/").items():
        say(f"  {size:>12,}  {key.removeprefix(uri.path.strip('/') + '/')}")


def _show_manifest(verified: VerifiedRun) -> None:
    manifest = verified.manifest
    total = sum(file.bytes for file in manifest.files)
    say(f"\nmanifest.json: {len(manifest.files)} files, {total:,} bytes, every SHA-256 verified")
    say(f"  model   {manifest.provenance.model_uri} at {manifest.provenance.model_revision}")
    say(f"  data    {manifest.provenance.dataset_uri} at {manifest.provenance.dataset_digest}")
    model = verified.report["model"]
    say(f"  layers  {model['modules']}, {model['quantization']['type']}, {model['trainableParameters']:,} trained")
    progress = manifest.progress
    if progress and progress.base_eval_loss is not None and progress.eval_loss is not None:
        say(f"  validation loss  {progress.base_eval_loss:.3f} (base) -> {progress.eval_loss:.3f} (tuned)")


def _show_answers(report: dict[str, Any]) -> None:
    say("\nAnswers, before and after:")
    for answer in report["prompts"]:
        say(f"  {answer['prompt']}")
        for column in ("before", "after", "merged"):
            if column in answer:
                say(f"    {column:<7} {' '.join(answer[column].split())}")


def _last_line(status: QLoRAJobStatus) -> str:
    progress, artifacts, job_run = status.progress, status.artifacts, status.run
    if progress is None or artifacts is None or job_run is None or not artifacts.adapter or not artifacts.merged:
        raise ClusterError(f"the status of the finished job is incomplete: {status.model_dump_json(by_alias=True)}")
    return (
        f"\nDEMO OK run={job_run.id} steps={progress.step} loss={progress.first_loss:.3f}->{progress.loss:.3f} "
        f"adapter={artifacts.adapter.uri} merged={artifacts.merged.uri}"
    )
