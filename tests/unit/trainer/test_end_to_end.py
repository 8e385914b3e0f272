"""One manifest through all three commands, on a tiny model, with folders in place of S3."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.context import Outcome
from qlora_trainer.publication import CLAIM
from qlorajob.errors import Reason
from qlorajob.identity import merge_key
from qlorajob.manifest import ArtifactManifest, Latest, files_digest
from qlorajob.status import Prepared
from tests.unit.trainer.jobs import Job

PROMPTS = ["code of zulu =", "code of hausa ="]


@dataclass(frozen=True)
class Done:
    """A finished job."""

    job: Job
    prepared: Prepared
    trained: Outcome
    report_before_merge: dict[str, Any]
    merged: Outcome

    @property
    def folder(self) -> Path:
        return self.job.output / self.prepared.run_id

    @property
    def manifest(self) -> ArtifactManifest:
        return ArtifactManifest.model_validate_json((self.folder / "manifest.json").read_bytes())

    @property
    def report(self) -> dict[str, Any]:
        return self.job.result(self.prepared, "report.json")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path) -> Done:
    job = Job(tmp_path_factory.mktemp("done"), model_folder, instructions)
    job.change(
        training={"maxSteps": 12, "saveSteps": 5},
        evaluation={"prompts": PROMPTS, "maxNewTokens": 6},
        merge={"enabled": True, "dtype": "float32"},
    )
    prepared = job.prepare()
    trained = job.train(prepared)
    report = job.result(prepared, "report.json")
    return Done(job, prepared, trained, report, job.run("merge", job.config(prepared)))


def test_the_loss_falls(done: Done) -> None:
    progress = done.trained.progress
    assert progress is not None
    assert progress.first_loss is not None
    assert progress.loss is not None
    assert progress.loss < progress.first_loss


def test_the_validation_loss_falls(done: Done) -> None:
    assert done.report["loss"]["evalTuned"] < done.report["loss"]["evalBase"]


def test_every_step_is_done_and_counted(done: Done) -> None:
    assert done.trained.progress is not None
    assert (done.trained.progress.step, done.trained.progress.total_steps) == (12, done.prepared.total_steps)


def test_the_model_really_was_in_4_bit(done: Done) -> None:
    model = done.report["model"]
    assert model["modules"]["Linear4bit"] == 14
    assert model["quantization"]["type"] == ["nf4"]
    assert model["quantization"]["doubleQuant"] == [True]
    assert model["quantization"]["bytes"] * 2 == model["quantizedParameters"]


def test_only_the_adapter_was_trained_and_in_float32(done: Done) -> None:
    ranks = 2 * 4 * (64 + 64 + 64 + 32 + 64 + 32 + 64 + 64 + 64 + 128 + 64 + 128 + 128 + 64)
    assert done.report["model"]["trainableParameters"] == ranks
    assert done.report["model"]["dtypes"]["adapter"] == ["float32"]


def test_every_file_of_the_manifest_has_its_size_and_digest(done: Done) -> None:
    for file in done.manifest.files:
        content = (done.folder / file.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256), file.path


def test_the_manifest_lists_everything_that_is_there(done: Done) -> None:
    there = {path.relative_to(done.folder).as_posix() for path in done.folder.rglob("*") if path.is_file()}
    assert there == {file.path for file in done.manifest.files} | {"manifest.json"}


def test_an_artifact_s_digest_is_that_of_its_files(done: Done) -> None:
    adapter = done.manifest.artifacts.adapter
    assert adapter is not None
    assert adapter.digest == files_digest(file for file in done.manifest.files if file.path.startswith("adapter/"))


def test_checkpoints_are_gone_after_success(done: Done) -> None:
    assert not (done.folder / "checkpoints").exists()


def test_latest_points_to_the_run(done: Done) -> None:
    latest = Latest.model_validate_json((done.job.output / "latest.json").read_bytes())
    assert (latest.run_id, latest.uri) == (done.prepared.run_id, f"file://{done.folder}")


def test_the_report_says_where_it_comes_from(done: Done) -> None:
    provenance = done.report["provenance"]
    assert provenance["modelRevision"] == done.prepared.model_revision
    assert provenance["datasetDigest"] == done.prepared.dataset_digest
    assert provenance["spec"]["lora"]["rank"] == 4
    assert set(provenance["versions"]) >= {"python", "torch", "transformers", "peft", "trl", "bitsandbytes"}


def test_the_report_says_what_ran_with_less_than_was_asked_for(done: Done) -> None:
    assert done.report["training"]["optimizer"] == "adamw_torch"
    assert any("paged_adamw_8bit runs as adamw_torch" in reason for reason in done.report["training"]["degradations"])


def test_there_is_a_validation_loss_with_each_checkpoint(done: Done) -> None:
    assert [entry["step"] for entry in done.report["loss"]["evaluations"]] == [5, 10, 12]


def test_base_tuned_and_merged_model_answer_side_by_side(done: Done) -> None:
    assert [set(entry) for entry in done.report["prompts"]] == [{"prompt", "text", "before", "after", "merged"}] * 2
    assert all(entry["before"] != entry["after"] for entry in done.report["prompts"])


def test_the_adapter_loads_in_another_process_and_answers_as_reported(done: Done, model_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        model_folder, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    tuned = PeftModel.from_pretrained(base, str(done.folder / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(done.folder / "adapter")
    asked = tokenizer(done.report["prompts"][0]["text"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said = tuned.eval().generate(input_ids=asked, max_new_tokens=6, do_sample=False)
    answer = tokenizer.decode(said[0, asked.shape[1] :], skip_special_tokens=True)
    assert answer == done.report["prompts"][0]["after"]


def test_the_adapter_names_its_base(done: Done, model_folder: Path) -> None:
    config = json.loads((done.folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"file://{model_folder}"


def test_the_merged_model_is_the_16_bit_base_plus_the_update(done: Done, model_folder: Path) -> None:
    from safetensors.torch import load_file

    layer = "model.layers.0.self_attn.q_proj"
    base = load_file(model_folder / "model.safetensors")[f"{layer}.weight"].float()
    adapter = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    down, up = (adapter[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
    merged = load_file(done.folder / "merged" / "model.safetensors")[f"{layer}.weight"]
    torch.testing.assert_close(merged, base + up @ down * (8 / 4))


def test_the_merged_model_loads_and_answers_as_reported(done: Done) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(done.folder / "merged", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(done.folder / "merged")
    asked = tokenizer(done.report["prompts"][1]["text"], return_tensors="pt")["input_ids"]
    said = model.generate(input_ids=asked, max_new_tokens=6, do_sample=False)
    answer = tokenizer.decode(said[0, asked.shape[1] :], skip_special_tokens=True)
    assert answer == done.report["prompts"][1]["merged"]


def test_training_again_finds_the_manifest_and_does_nothing(done: Done) -> None:
    before = (done.folder / "manifest.json").stat().st_mtime_ns
    again = done.job.train(done.prepared)
    assert again.reason is Reason.ALREADY_TRAINED
    assert again.artifacts == done.manifest.artifacts
    assert (done.folder / "manifest.json").stat().st_mtime_ns == before


def test_preparing_again_finds_the_artifacts(done: Done) -> None:
    outcome = done.job.run("prepare", done.job.config())
    assert outcome.reason is Reason.ALREADY_TRAINED
    assert outcome.prepared is not None
    assert outcome.prepared.artifacts == done.manifest.artifacts


def test_preparing_again_tells_which_merge_it_found(done: Done) -> None:
    wanted = deepcopy(done.job.spec)
    try:
        as_it_is = done.job.run("prepare", done.job.config()).prepared
        done.job.change(merge={"dtype": "bfloat16"})
        in_another_type = done.job.run("prepare", done.job.config()).prepared
    finally:
        done.job.spec = wanted
    assert as_it_is
    assert in_another_type
    assert (as_it_is.merge_key, in_another_type.merge_key) == (merge_key(done.job.config().spec), None)


def test_preparing_again_ends_what_a_killed_trainer_left_after_its_manifest(done: Done) -> None:
    (done.job.output / "latest.json").unlink()
    left = [done.folder / CLAIM, done.folder / "checkpoints" / "step-5.0badcafe" / "state"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    done.job.run("prepare", done.job.config())
    assert (done.job.output / "latest.json").exists()
    assert not any(path.exists() for path in left)


def test_merging_again_does_nothing(done: Done) -> None:
    before = (done.folder / "manifest.json").stat().st_mtime_ns
    done.job.run("merge", done.job.config(done.prepared))
    assert (done.folder / "manifest.json").stat().st_mtime_ns == before


def test_a_latest_that_got_lost_is_written_again(done: Done) -> None:
    (done.job.output / "latest.json").unlink()
    done.job.train(done.prepared)
    assert (done.job.output / "latest.json").exists()


@pytest.fixture
def gated(job: Job) -> Job:
    """A job whose adapter can't beat the base, since its steps are too small to change anything."""
    return job.change(training={"learningRate": 1e-30}, evaluation={"gate": {}}, merge={"enabled": True})


def test_an_adapter_that_fails_the_gate_is_kept_but_not_published(gated: Job) -> None:
    trained = gated.train()
    assert (trained.reason, trained.promoted) == (Reason.NOT_BETTER_THAN_BASE, False)
    assert trained.artifacts is not None
    assert trained.artifacts.adapter is not None
    assert not (gated.output / "latest.json").exists()


def test_an_adapter_that_failed_the_gate_is_not_merged(gated: Job) -> None:
    prepared = gated.prepare()
    gated.train(prepared)
    merged = gated.run("merge", gated.config(prepared))
    assert merged.reason is Reason.NOT_BETTER_THAN_BASE
    assert not (gated.output / prepared.run_id / "merged").exists()
