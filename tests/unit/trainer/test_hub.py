"""hf:// URIs: the real huggingface_hub against a server that answers as the hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlorajob.errors import ExitCode, Reason
from qlorajob.run import RunReport
from tests.unit.trainer.hub_server import COMMIT, Hub, running
from tests.unit.trainer.jobs import SPOILT, Job, spoil

ROOT = Path(__file__).parents[3]


@pytest.fixture
def hub(model_folder: Path, instructions: Path) -> Iterator[Hub]:
    with running() as hub:
        hub.repos = {"models/org/tiny": model_folder, "datasets/org/codes": instructions.parent}
        yield hub


def _prepare(job: Job, endpoint: str, **env: str) -> RunReport:
    """In a process of its own, since huggingface_hub reads its endpoint when it is imported."""
    environment = {**os.environ, **job.environment(job.config()), "HF_ENDPOINT": endpoint, **env}
    environment["PYTHONPATH"] = f"{ROOT}/operator:{ROOT}/trainer_image"
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "qlora_trainer", "prepare"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    report = RunReport.model_validate_json((job.folder / "report.json").read_text())
    assert done.returncode == report.exit_code, done.stdout + done.stderr
    return report


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path
) -> tuple[RunReport, list[str]]:
    """Report of a job with a gated model and a dataset on the hub, and what it asked the hub for."""
    job = Job(tmp_path_factory.mktemp("hub"), model_folder, instructions)
    job.change(model={"uri": "hf://org/tiny@v1"}, dataset={"uri": "hf://org/codes"})
    with running() as hub:
        hub.repos = {"models/org/tiny": model_folder, "datasets/org/codes": instructions.parent}
        hub.gated = {"models/org/tiny"}
        return _prepare(job, hub.endpoint, HF_TOKEN=hub.token), hub.requested


def test_a_gated_model_loads_with_a_token(prepared: tuple[RunReport, list[str]]) -> None:
    assert prepared[0].reason is Reason.SUCCEEDED


def test_a_model_is_pinned_to_its_commit(prepared: tuple[RunReport, list[str]]) -> None:
    assert prepared[0].prepared is not None
    assert prepared[0].prepared.model_revision == COMMIT


def test_a_dataset_s_rows_are_read(prepared: tuple[RunReport, list[str]]) -> None:
    assert prepared[0].prepared is not None
    assert prepared[0].prepared.train_rows == 43


def test_prepare_reads_of_the_weights_their_head_alone(
    prepared: tuple[RunReport, list[str]], model_folder: Path
) -> None:
    assert any(path.endswith("/config.json") for path in prepared[1])
    assert [request for request in prepared[1] if "safetensors" in request] == [
        f"/org/tiny/resolve/{COMMIT}/model.safetensors bytes=0-{last}" for last in _head(model_folder)
    ]


def _head(model: Path) -> tuple[int, int]:
    """The last bytes of what tells how long the head of the weights is, and of the head."""
    with (model / "model.safetensors").open("rb") as file:
        return 7, 7 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("knows_ranges", [True, False])
@pytest.mark.parametrize(("kept", "without", "words"), SPOILT)
def test_weights_that_are_not_whole_are_refused_by_their_head(
    job: Job, hub: Hub, model_folder: Path, kept: int | None, without: str, words: str, knows_ranges: bool
) -> None:
    folder = hub.repos["models/org/tiny"] = job.folder / "changed"
    spoil(model_folder, folder, kept, without)
    hub.knows_ranges = knows_ranges
    report = _prepare(job.change(model={"uri": "hf://org/tiny"}), hub.endpoint)
    assert (report.reason, report.field) == (Reason.MODEL_INVALID, "model.uri")
    assert words in report.message


def test_a_hub_need_not_tell_sizes(job: Job, hub: Hub) -> None:
    hub.tells_sizes = False
    assert _prepare(job.change(model={"uri": "hf://org/tiny"}), hub.endpoint).reason is Reason.SUCCEEDED


def test_prepare_brings_the_weights_into_the_cache_claim(job: Job, hub: Hub) -> None:
    cache = job.folder / "mounts" / "cache"
    cache.mkdir(parents=True)
    _prepare(job.change(model={"uri": "hf://org/tiny", "cacheClaim": "weights"}), hub.endpoint)
    assert [path.name for path in cache.rglob("*.safetensors")] == ["model.safetensors"]


def test_a_gated_model_without_a_token_names_the_field(job: Job, hub: Hub) -> None:
    hub.gated = {"models/org/tiny"}
    report = _prepare(job.change(model={"uri": "hf://org/tiny"}), hub.endpoint)
    assert (report.reason, report.field) == (Reason.ACCESS_DENIED, "model.tokenSecretRef")


def test_an_unknown_model_is_named(job: Job, hub: Hub) -> None:
    report = _prepare(job.change(model={"uri": "hf://org/nothing"}), hub.endpoint)
    assert (report.exit_code, report.reason, report.field) == (
        ExitCode.INVALID,
        Reason.MODEL_NOT_FOUND,
        "model.uri",
    )
    assert "there is no org/nothing on the hub" in report.message


def test_an_unknown_revision_is_named(job: Job, hub: Hub) -> None:
    report = _prepare(job.change(model={"uri": "hf://org/tiny@v9"}), hub.endpoint)
    assert (report.reason, report.message) == (Reason.MODEL_NOT_FOUND, "model.uri: org/tiny has no revision v9")


def test_an_unknown_dataset_is_named(job: Job, hub: Hub) -> None:
    report = _prepare(job.change(dataset={"uri": "hf://org/nothing"}), hub.endpoint)
    assert (report.reason, report.field) == (Reason.DATASET_NOT_FOUND, "dataset.uri")


def test_an_unknown_split_is_named(job: Job, hub: Hub) -> None:
    report = _prepare(job.change(dataset={"uri": "hf://org/codes", "split": "dev"}), hub.endpoint)
    assert (report.reason, report.field) == (Reason.DATASET_NOT_FOUND, "dataset.split")
    assert "org/codes has no split dev" in report.message


@pytest.fixture
def subsets(hub: Hub, tmp_path: Path) -> None:
    """A dataset in two subsets, as its card says."""
    folder = tmp_path / "subsets"
    folder.mkdir()
    names = {"short": 3, "long": 30}
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in names)
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name, count in names.items():
        rows = [{"instruction": f"{name} {number}", "output": "x"} for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub.repos["datasets/org/subsets"] = folder


def test_a_dataset_in_subsets_needs_one_to_be_named(job: Job, hub: Hub, subsets: None) -> None:
    report = _prepare(job.change(dataset={"uri": "hf://org/subsets"}), hub.endpoint)
    assert (report.reason, report.field) == (Reason.DATASET_NOT_FOUND, "dataset.subset")
    assert "'short', 'long'" in report.message


def test_a_subset_may_be_named(job: Job, hub: Hub, subsets: None) -> None:
    dataset = {"uri": "hf://org/subsets", "subset": "long", "validation": None}
    report = _prepare(job.change(dataset=dataset), hub.endpoint)
    assert report.prepared is not None, report.message
    assert report.prepared.train_rows == 30


@pytest.fixture
def add_dataset(hub: Hub, tmp_path: Path) -> Callable[..., str]:
    """Put a dataset of these files on the hub; returns its URI."""

    def add(**files: str) -> str:
        folder = tmp_path / "files"
        folder.mkdir()
        for name, content in files.items():
            (folder / f"{name}.jsonl").write_text(content)
        hub.repos["datasets/org/files"] = folder
        return "hf://org/files"

    return add


def test_a_broken_row_is_named_by_file_and_line(job: Job, hub: Hub, add_dataset: Callable[..., str]) -> None:
    uri = add_dataset(first='{"text": "a"}\n', second='{"text": "b"}\n{"text": b\n')
    report = _prepare(job.change(dataset={"uri": uri}), hub.endpoint)
    assert (report.exit_code, report.reason) == (ExitCode.INVALID, Reason.DATASET_INVALID)
    assert "dataset: second.jsonl line 2: not valid JSON" in report.message


def test_files_with_other_columns_are_refused_with_their_names(
    job: Job, hub: Hub, add_dataset: Callable[..., str]
) -> None:
    uri = add_dataset(first='{"text": "a"}\n', second='{"text": "b", "source": 1}\n')
    report = _prepare(job.change(dataset={"uri": uri}), hub.endpoint)
    assert (report.reason, report.field) == (Reason.DATASET_INVALID, "dataset.uri")
    assert "source: int64" in report.message


def test_a_dataset_without_files_is_not_tried_again(job: Job, hub: Hub, add_dataset: Callable[..., str]) -> None:
    report = _prepare(job.change(dataset={"uri": add_dataset()}), hub.endpoint)
    assert (report.exit_code, report.reason, report.field) == (
        ExitCode.INVALID,
        Reason.DATASET_NOT_FOUND,
        "dataset.uri",
    )


def test_an_outage_while_a_dataset_is_looked_at_is_tried_again(job: Job, hub: Hub) -> None:
    hub.away = {"/resolve/"}
    report = _prepare(job.change(dataset={"uri": "hf://org/codes"}), hub.endpoint)
    assert (report.exit_code, report.reason, report.field) == (
        ExitCode.TRANSIENT,
        Reason.ENDPOINT_UNREACHABLE,
        "dataset.uri",
    )


def test_a_dataset_whose_download_breaks_off_is_tried_again(job: Job, hub: Hub) -> None:
    hub.cut_off = {"codes.jsonl"}
    report = _prepare(job.change(dataset={"uri": "hf://org/codes"}), hub.endpoint)
    assert (report.exit_code, report.field) == (ExitCode.TRANSIENT, "dataset.uri"), report.message


def test_an_unreachable_hub_is_tried_again(job: Job) -> None:
    report = _prepare(job.change(model={"uri": "hf://org/tiny"}), "http://127.0.0.1:9")
    assert (report.exit_code, report.reason) == (ExitCode.TRANSIENT, Reason.ENDPOINT_UNREACHABLE)
