"""The main job, end to end, with real weights: what a user types, and everything that is true afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from ruamel.yaml import YAML

import weights
from cluster.layout import PROMETHEUS_PORT
from demo.verify import VerificationError, VerifiedRun, list_keys, verify_run
from qlora_trainer.gguf_export import answer
from tests.support.live import Cluster, Manifest, Namespace, eventually
from tests.support.prometheus import query

KINDS = ("adapter", "merged")
ANSWERS = Path(__file__).parents[1] / "support" / "answers.py"


@dataclass(frozen=True)
class Finished:
    """The quickstart after its end."""

    namespace: Namespace
    manifest: Manifest
    status: Manifest
    run: VerifiedRun
    s3: Any

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    def download(self, part: str, directory: Path) -> Path:
        """Copy adapter/, merged/ or gguf/ of the run out of S3."""
        bucket = urlsplit(self.manifest["spec"]["output"]["uri"]).netloc
        prefix = f"{self.run.prefix}/{part}/"
        for key in list_keys(self.s3, bucket, prefix):
            file = directory / key.removeprefix(prefix)
            file.parent.mkdir(parents=True, exist_ok=True)
            self.s3.download_file(bucket, key, str(file))
        return directory


@pytest.fixture(scope="module")
def finished(cluster: Cluster, namespace: Namespace) -> Finished:
    """examples/quickstart.yaml, applied and waited for; the output's prefix and a GGUF export are this test's own."""
    path = cluster.layout.repository / "examples" / "quickstart.yaml"
    manifest: Manifest = YAML(typ="safe", pure=True).load(path)
    manifest["spec"]["output"]["uri"] += f"-{time.time_ns()}"
    manifest["spec"]["merge"]["gguf"] = {"quantization": "q8_0"}
    namespace.apply(manifest)
    status = namespace.wait("quickstart", "Complete", seconds=900)
    s3 = cluster.target.s3()
    run = verify_run(s3, manifest["spec"]["output"]["uri"], status["run"]["id"])
    return Finished(namespace, manifest, status, run, s3)


@pytest.fixture(scope="module")
def answers(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], list[str]]]:
    """What the adapter and the merged model answer, each in a fresh process; both are asked at once."""
    with ThreadPoolExecutor(2) as pool:
        asked = {kind: pool.submit(_answers, kind, tmp_path_factory.mktemp(kind), finished) for kind in KINDS}
        yield lambda kind: asked[kind].result()


def _answers(kind: str, directory: Path, finished: Finished) -> list[str]:
    finished.download(kind, directory)
    report = finished.run.report
    prompts = json.dumps([entry["text"] for entry in report["prompts"]])
    base = weights.default_destination()
    command = [sys.executable, ANSWERS, kind, directory, base, "20"]
    done = subprocess.run([str(part) for part in command], input=prompts, capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout)
    return found


def test_the_adapter_answers_in_a_fresh_process_as_the_report_says(
    finished: Finished, answers: Callable[[str], list[str]]
) -> None:
    assert answers("adapter") == [entry["after"] for entry in finished.run.report["prompts"]]


def test_the_merged_model_answers_in_a_fresh_process_as_the_report_says(
    finished: Finished, answers: Callable[[str], list[str]]
) -> None:
    assert answers("merged") == [entry["merged"] for entry in finished.run.report["prompts"]]


def test_the_gguf_file_answers_in_llama_cpp_as_the_report_says(finished: Finished, tmp_path: Path) -> None:
    (file,) = finished.download("gguf", tmp_path).iterdir()
    prompts = finished.run.report["prompts"]
    assert [answer(file, entry["text"], 20) for entry in prompts] == [entry["gguf"] for entry in prompts]


def test_the_gguf_file_is_an_artifact_of_the_run(finished: Finished) -> None:
    artifact, exported = finished.run.manifest.artifacts.gguf, finished.run.report["merge"]["gguf"]
    assert artifact is not None
    assert artifact.uri == f"{finished.manifest['spec']['output']['uri']}/{finished.status['run']['id']}/gguf"
    assert artifact.bytes == exported["bytes"] > 100_000_000
    assert f"gguf/{exported['file']}" in {listed.path for listed in finished.run.manifest.files}
    assert exported["quantization"] == "q8_0"


def test_the_answers_have_changed_to_what_was_taught(finished: Finished) -> None:
    answers = {entry["prompt"]: entry for entry in finished.run.report["prompts"]}
    zulu = answers["What is the ISO 639-3 code of Zulu?"]
    assert "(Zulu, a living language)" not in zulu["before"]
    assert "(Zulu, a living language)" in zulu["after"]
    assert "(Zulu, a living language)" in zulu["merged"]
    assert "(Zulu, a living language)" in zulu["gguf"]


def test_the_validation_loss_fell(finished: Finished) -> None:
    progress = finished.status["progress"]
    assert progress["evalLoss"] < 0.7 * progress["baseEvalLoss"]


def test_the_trained_model_was_four_bit(finished: Finished) -> None:
    model = finished.run.report["model"]
    assert model["modules"]["Linear4bit"] == 210  # 30 layers of q, k, v, o, gate, up, down
    assert model["quantization"]["layers"] == 210
    assert model["quantization"]["type"] == ["nf4"]
    assert model["quantization"]["doubleQuant"] == [True]
    assert model["quantization"]["bytes"] * 2 == model["quantizedParameters"]
    assert 0 < model["trainableParameters"] < 0.05 * model["quantizedParameters"]


def test_kubectl_get_prints_the_columns_of_the_design(finished: Finished) -> None:
    header, row, *_ = finished.namespace.kubectl("get", "qlj", finished.name).splitlines()
    assert header.split() == ["NAME", "MODEL", "PHASE", "STEP", "LOSS", "TOK/S", "ETA", "GPU", "AGE"]
    assert "Succeeded" in row.split()
    assert "cpu" in row.split()


def test_kubectl_explain_explains(finished: Finished) -> None:
    answer = finished.namespace.kubectl("explain", "qlorajob.spec.lora.rank")
    assert "Rank of the update" in answer
    assert "DEFAULT" in answer.upper() or "16" in answer


def test_describe_tells_the_story_in_events(finished: Finished) -> None:
    reasons = [event["reason"] for event in finished.namespace.events(finished.name)]
    story = [reason for reason in reasons if reason in {"Preparing", "Prepared", "Planned", "Training", "Trained"}]
    assert story[0] == "Preparing"
    assert {"Training", "Merging", "Succeeded"} <= set(reasons)
    assert [event for event in finished.namespace.events(finished.name) if event["type"] == "Warning"] == []


def test_conditions_are_what_kubectl_wait_flux_and_argo_read(finished: Finished) -> None:
    conditions = {item["type"]: item["status"] for item in finished.status["conditions"]}
    assert conditions["Ready"] == "True"
    assert conditions["Complete"] == "True"
    assert conditions["Finished"] == "True"
    assert {conditions.get(name, "False") for name in ("Reconciling", "Stalled", "Failed")} == {"False"}
    assert finished.status["observedGeneration"] == finished.namespace.job(finished.name)["metadata"]["generation"]


def test_every_pod_kept_the_restricted_standard(finished: Finished) -> None:
    pods = finished.namespace.pods(finished.name)
    assert {pod["metadata"]["labels"]["qlora.dev/step"] for pod in pods} == {"prepare", "train", "merge"}
    for pod in pods:
        container = pod["spec"]["containers"][0]["securityContext"]
        assert container["readOnlyRootFilesystem"] is True
        assert container["capabilities"] == {"drop": ["ALL"]}
        assert pod["spec"]["automountServiceAccountToken"] is False


def test_prometheus_scraped_the_trainer(finished: Finished) -> None:
    selector = f'{{namespace="{finished.namespace.name}"}}'
    losses = query(f"max_over_time(qlora_train_loss{selector}[1h])")
    assert losses
    assert all(0 < value < 20 for value in losses.values())
    assert query(f"max_over_time(qlora_train_tokens_per_second{selector}[1h])")


def test_gpu_memory_is_absent_on_cpu_and_not_zero(finished: Finished) -> None:
    assert query(f'{{__name__=~"qlora_gpu_memory_.*",namespace="{finished.namespace.name}"}}') == {}


def test_prometheus_counts_the_job(finished: Finished) -> None:
    selector = f'exported_namespace="{finished.namespace.name}",phase="Succeeded"'
    eventually(
        lambda: 1.0 in query(f"qlora_jobs{{{selector}}}").values(),
        30,
        f"qlora_jobs{{{selector}}} on :{PROMETHEUS_PORT}",
    )


def test_applying_the_same_manifest_again_changes_nothing(finished: Finished) -> None:
    before = {job["metadata"]["uid"] for job in finished.namespace.jobs(finished.name)}
    finished.namespace.apply(finished.manifest)
    assert finished.namespace.status(finished.name)["phase"] == "Succeeded"
    assert {job["metadata"]["uid"] for job in finished.namespace.jobs(finished.name)} == before


def test_a_recreated_job_finds_its_finished_run_and_trains_nothing(finished: Finished) -> None:
    finished.namespace.kubectl("delete", "qlj", finished.name, "--wait")
    finished.namespace.apply(finished.manifest)
    status = finished.namespace.wait(finished.name, "Complete", seconds=180)
    assert status["run"]["id"] == finished.status["run"]["id"]
    assert status["artifacts"] == finished.status["artifacts"]
    assert finished.namespace.jobs(finished.name, "train") == []
    assert finished.namespace.jobs(finished.name, "merge") == []


def test_the_demos_verification_notices_a_changed_and_an_unlisted_file(finished: Finished) -> None:
    output = finished.manifest["spec"]["output"]["uri"]
    run_id = finished.status["run"]["id"]
    bucket = urlsplit(output).netloc
    config = f"{finished.run.prefix}/adapter/adapter_config.json"
    original = finished.s3.get_object(Bucket=bucket, Key=config)["Body"].read()
    finished.s3.put_object(Bucket=bucket, Key=config, Body=original.replace(b"16", b"61", 1))
    with pytest.raises(VerificationError, match="is not what the manifest lists"):
        verify_run(finished.s3, output, run_id)
    finished.s3.put_object(Bucket=bucket, Key=config, Body=original)
    finished.s3.put_object(Bucket=bucket, Key=f"{finished.run.prefix}/adapter/stray", Body=b"?")
    with pytest.raises(VerificationError, match="stray"):
        verify_run(finished.s3, output, run_id)
    finished.s3.delete_object(Bucket=bucket, Key=f"{finished.run.prefix}/adapter/stray")
    assert verify_run(finished.s3, output, run_id).manifest == finished.run.manifest
