"""What a URI's thing is called, and where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_trainer.storage import LocalStorage, open_storage
from qlora_trainer.uris import local_path, short_name
from qlorajob.errors import Reason, StepError
from qlorajob.spec import OutputSpec
from tests.unit.trainer.jobs import Job


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("hf://Qwen/Qwen2-7B", "Qwen2-7B"),
        ("hf://Qwen/Qwen2-7B@v1.0", "Qwen2-7B"),
        ("hf://Qwen/Qwen2-7B@refs/pr/1", "Qwen2-7B"),
        ("s3://models/team/SmolLM2-135M/", "SmolLM2-135M"),
        ("s3://models/at@home", "at@home"),
        ("pvc://weights", "weights"),
        ("pvc://weights/My%20Models/Tiny%20Llama/", "Tiny Llama"),
    ],
)
def test_a_thing_is_called_by_the_end_of_its_uri(uri: str, name: str) -> None:
    assert short_name(uri) == name


NAME, WRITTEN = "My Data é#1?100%", "My%20Data%20é%231%3F100%25"
"""A name as it is on the disk, and as the manifest writes it."""


@pytest.mark.parametrize("scheme", ["file", "pvc"])
def test_a_path_is_percent_encoded(job: Job, tmp_path: Path, scheme: str) -> None:
    settings = job.settings()
    root = tmp_path if scheme == "file" else settings.mount_root / "pvc" / "claim"
    (root / NAME).mkdir(parents=True)
    uri = f"file://{tmp_path}/{WRITTEN}" if scheme == "file" else f"pvc://claim/{WRITTEN}"
    changed = job.change(dataset={"uri": uri})  # the manifest takes it
    found = local_path(changed.config().spec.dataset.uri, settings, missing=Reason.DATASET_NOT_FOUND, field="x")
    assert found == root / NAME


def test_so_is_the_folder_of_the_output(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/{WRITTEN}"
    output = OutputSpec.model_validate({"uri": uri}, context={"local": True})
    storage = open_storage(uri, output, field="output.uri")
    assert isinstance(storage, LocalStorage)
    storage.write("a", b"1")
    assert (tmp_path / NAME / "a").read_bytes() == b"1"


@pytest.mark.parametrize("path", ["%2e%2e/other/rows.jsonl", "a%2F..%2F..%2Fother%2Frows.jsonl"])
def test_encoded_dots_lead_to_no_other_claim(job: Job, path: str) -> None:
    settings = job.settings()
    for claim in ("claim/a", "other"):
        (settings.mount_root / "pvc" / claim).mkdir(parents=True)
    (settings.mount_root / "pvc" / "other" / "rows.jsonl").touch()
    with pytest.raises(StepError, match="in the claim claim") as refused:
        local_path(f"pvc://claim/{path}", settings, missing=Reason.DATASET_NOT_FOUND, field="dataset.uri")
    assert (refused.value.reason, refused.value.field) == (Reason.DATASET_NOT_FOUND, "dataset.uri")
