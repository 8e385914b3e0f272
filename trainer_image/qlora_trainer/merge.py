"""merge: add the adapter to the original 16-bit weights and put the merged model beside it. Needs no GPU.

Never from re-quantized weights: that would bake the 4-bit rounding in and degrade the adapter.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from qlora_trainer import logs
from qlora_trainer.artifacts import RunStore
from qlora_trainer.context import Context
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.manifest import ADAPTER, MERGED, REPORT, ArtifactManifest, ManifestFile

logger = logging.getLogger(__name__)


def run(context: Context) -> None:
    """Merge, or find that it is done or not wanted."""
    settings, spec, outcome = context.settings, context.spec, context.outcome
    prepared = settings.prepared
    store = RunStore.open(settings, prepared.run_id)
    manifest = store.manifest()
    if manifest is None:
        message = f"there is no finished adapter at {store.storage.uri}: train comes before merge"
        raise StepError(Reason.STORAGE_UNAVAILABLE, message, field="output.uri", code=ExitCode.TRANSIENT)
    outcome.artifacts, outcome.promoted = manifest.artifacts, manifest.promoted
    if manifest.promoted is False:
        outcome.reason = Reason.NOT_BETTER_THAN_BASE
        outcome.message = "the adapter isn't better than the base model (evaluation.gate): not merged"
        return
    report = json.loads(store.storage.read(REPORT) or b"{}")
    if manifest.artifacts.merged is not None and report.get("merge", {}).get("dtype") == spec.merge.dtype:
        outcome.message = f"run {prepared.run_id} is already merged"
        return

    from qlora_trainer.model_source import open_model
    from qlora_trainer.tokenizer import load_tokenizer

    source = open_model(settings, prepared.model_revision)
    base = source.weights_folder()
    adapter = _clean(settings.folder(ADAPTER))
    store.download_tree(manifest.files, ADAPTER, adapter)
    model = _merged_model(context, base, adapter)
    tokenizer = load_tokenizer(base, settings)
    merged = _clean(settings.folder(MERGED))
    model.save_pretrained(str(merged))
    tokenizer.save_pretrained(str(merged))
    files = store.upload_tree(merged, MERGED)
    logger.info("merged model is in storage", extra={"bytes": sum(file.bytes for file in files)})

    report["merge"] = {"dtype": spec.merge.dtype}
    _answer(context, report, model, tokenizer)
    files += (store.write_file(REPORT, json.dumps(report, ensure_ascii=False, indent=1).encode()),)
    manifest = _with_merged(manifest, files, store)
    store.publish(manifest)
    outcome.artifacts = manifest.artifacts
    outcome.message = f"merged into {spec.merge.dtype} weights"


def _merged_model(context: Context, base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    from qlora_trainer.hardware import DTYPES
    from qlora_trainer.model import load_16bit

    logs.tame_libraries()
    model = load_16bit(base, context.settings, DTYPES[context.spec.merge.dtype])
    logger.info("base model loaded", extra={"dtype": context.spec.merge.dtype})
    tuned = PeftModel.from_pretrained(model, str(adapter))
    return tuned.merge_and_unload(safe_merge=True)  # refuses to write weights that aren't numbers


def _answer(context: Context, report: dict[str, Any], model: Any, tokenizer: Any) -> None:
    """Let the merged model answer the prompts too, beside what base and tuned model said."""
    from qlora_trainer.evaluation import answers
    from qlora_trainer.formats import Columns, Encoder

    spec = context.spec
    asked = [entry["prompt"] for entry in report.get("prompts", [])]
    if not asked:
        return
    encoder = Encoder(tokenizer, spec.dataset, Columns(report["data"]["format"], {}))
    ids = [encoder.prompt_ids(prompt) for prompt in asked]
    for entry, answer in zip(
        report["prompts"], answers(model, tokenizer, ids, spec.evaluation.max_new_tokens), strict=True
    ):
        entry["merged"] = answer


def _with_merged(manifest: ArtifactManifest, new: tuple[ManifestFile, ...], store: RunStore) -> ArtifactManifest:
    """The manifest with the merged model's files and the new report in place of any older ones."""
    kept = tuple(file for file in manifest.files if file.path != REPORT and not file.path.startswith(f"{MERGED}/"))
    files = kept + new
    artifacts = manifest.artifacts.model_copy(
        update={"merged": store.artifact(files, MERGED), "report": store.artifact(files, REPORT)}
    )
    return manifest.model_copy(update={"files": files, "artifacts": artifacts})


def _clean(folder: Path) -> Path:
    """The folder without what an earlier step in the same work folder left (`qlora run` shares one)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
