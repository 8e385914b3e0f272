"""merge: add the adapter to the original 16-bit weights and put the merged model beside it. Needs no GPU.

Never from re-quantized weights: that would bake the 4-bit rounding in and degrade the adapter. A tensor at a time, and
each file is uploaded as soon as it is written, so that a model of any size merges in a few GB of memory.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_trainer import gguf_export, logs
from qlora_trainer.artifacts import RunStore
from qlora_trainer.context import Context
from qlora_trainer.libraries import import_bitsandbytes, importing_much
from qlora_trainer.settings import usable_memory
from qlora_trainer.uris import short_name
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.manifest import ADAPTER, GGUF, MERGED, REPORT, REPORT_PAGE, ArtifactManifest, ManifestFile
from qlorajob.spec import MergeSpec

if TYPE_CHECKING:
    from qlora_trainer.merging import Merge

logger = logging.getLogger(__name__)

LOADING_BYTES = 3 << 29
"""Memory that generating takes beside the weights: Python, torch, transformers and the activations."""
WRITTEN = (f"{MERGED}/", f"{GGUF}/", REPORT, REPORT_PAGE)
"""Where in the run's prefix a merge writes."""
NOT_TENSORS = ("generation_config.json", "*.py")
"""Files of the base model that belong to the merged one as they are: code that comes with the model, defaults."""


def run(context: Context) -> None:
    """Merge, or find that it is done or not wanted."""
    settings, spec, outcome = context.settings, context.spec, context.outcome
    prepared = settings.prepared
    store = RunStore.open(settings, prepared.run_id, context.stop)
    manifest = store.manifest()
    if manifest is None:
        message = f"there is no finished adapter at {store.storage.uri}: train comes before merge"
        raise StepError(Reason.STORAGE_UNAVAILABLE, message, field="output.uri", code=ExitCode.TRANSIENT)
    outcome.artifacts, outcome.promoted = manifest.artifacts, manifest.promoted
    if manifest.promoted is False:
        outcome.reason = Reason.NOT_BETTER_THAN_BASE
        outcome.message = "the adapter isn't better than the base model (evaluation.gate): not merged"
        return
    report = store.report()
    if is_done(manifest, report, spec.merge):
        outcome.message = f"run {prepared.run_id} is already merged"
        return

    manifest = _merge(context, store, manifest, report)
    outcome.artifacts = manifest.artifacts
    exported = f", exported as {spec.merge.gguf.quantization}" if spec.merge.gguf else ""
    outcome.message = f"merged into {spec.merge.dtype} weights{exported}"


def is_done(manifest: ArtifactManifest, report: dict[str, Any], wanted: MergeSpec) -> bool:
    """Whether the manifest lists all that is wanted, as it is wanted."""
    done = report.get("merge", {})
    if manifest.artifacts.merged is None or done.get("dtype") != wanted.dtype:
        return False
    if wanted.gguf is None:
        return True
    return manifest.artifacts.gguf is not None and done.get("gguf", {}).get("quantization") == wanted.gguf.quantization


def _merge(context: Context, store: RunStore, manifest: ArtifactManifest, report: dict[str, Any]) -> ArtifactManifest:
    with importing_much():
        import_bitsandbytes()
        from qlora_trainer.hardware import DTYPES
        from qlora_trainer.merging import plan_merge
        from qlora_trainer.model_source import open_model
        from qlora_trainer.report_page import report_files
        from qlora_trainer.tokenizer import load_tokenizer, trusts_remote_code

    settings, wanted = context.settings, context.spec.merge
    code = trusts_remote_code(settings)
    logs.tame_libraries()
    base = open_model(settings, settings.prepared.model_revision).weights_folder()
    adapter = _clean(settings.folder(ADAPTER))
    store.download_tree(manifest.files, ADAPTER, adapter)
    if wanted.gguf is not None:
        # prepare has tried this, but maybe another image's llama.cpp: better now than after hours of merging.
        gguf_export.check(base, settings.folder(GGUF), trust_remote_code=code)
    merge = plan_merge(base, adapter, DTYPES[wanted.dtype], trust_remote_code=code)
    report["merge"] = {"dtype": wanted.dtype, "layers": len(merge.layers), "bytes": merge.bytes}

    manifest = _retracted(manifest)
    store.publish(manifest)  # or a merge that dies on the way would leave a manifest that lists what isn't there
    folder, tokenizer = _clean(settings.folder(MERGED)), load_tokenizer(base, settings)
    asks = bool(report.get("prompts")) and _can_load(merge.bytes, report)
    files = _write_weights(merge, folder, store, keep=asks or wanted.gguf is not None)
    del merge
    files += _write_metadata(base, folder, store, tokenizer, wanted.dtype)
    store.keep_only(files, MERGED)
    store.storage.abort_uploads()  # of a merge that was killed, and of this one where S3 took neither parts nor aborts
    logger.info("merged model is in storage", extra={"bytes": sum(file.bytes for file in files)})

    if asks:
        _answer(context, report, folder, tokenizer)
    exported = _write_gguf(context, report, folder, store, asks=asks, bos=tokenizer.bos_token)
    store.keep_only(exported, GGUF)
    pages = tuple(store.write_file(name, content) for name, content in report_files(report).items())
    manifest = _with_merged(manifest, files + exported + pages, store)
    store.publish(manifest)
    return manifest


def _write_weights(merge: Merge, folder: Path, store: RunStore, *, keep: bool) -> tuple[ManifestFile, ...]:
    """Merge and upload file by file. Unless they are wanted here too (`keep`), the disk holds one of them at a time."""
    from qlora_trainer.checkpoint_files import SAFETENSORS_INDEX, index_of, plan_shards, write_shard

    shards = plan_shards(merge.tensors)
    files = []
    for shard in shards:
        path = folder / shard.file
        write_shard(path, shard, merge.compute)
        files.append(store.upload_file(path, f"{MERGED}/{shard.file}"))
        logger.info("merged %s", shard.file, extra={"bytes": shard.bytes, "tensors": len(shard.tensors)})
        if not keep:
            path.unlink()
    if len(shards) > 1:
        path = folder / SAFETENSORS_INDEX
        path.write_text(json.dumps(index_of(shards), indent=1), encoding="utf-8")
        files.append(store.upload_file(path, f"{MERGED}/{path.name}"))
    return tuple(files)


def _write_metadata(base: Path, folder: Path, store: RunStore, tokenizer: Any, dtype: str) -> tuple[ManifestFile, ...]:
    """Config, tokenizer, chat template and code: all that makes the weights a model."""
    before = set(folder.iterdir())
    for pattern in NOT_TENSORS:
        for path in base.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config = {"dtype": dtype} | _with_dtype(config, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(str(folder))
    written = sorted(path for path in folder.rglob("*") if path.is_file() and path not in before)
    return tuple(store.upload_file(path, f"{MERGED}/{path.relative_to(folder).as_posix()}") for path in written)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with the new type wherever it names the old one: `torch_dtype` until transformers 5, then `dtype`."""
    changed = dict(config)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            changed[key] = dtype
        elif isinstance(value, dict):
            changed[key] = _with_dtype(value, dtype)
    return changed


def _can_load(size: int, report: dict[str, Any]) -> bool:
    """Whether a model of this size can be held in memory whole; the report says so if not."""
    need, limit = size + size // 8 + LOADING_BYTES, usable_memory()
    if need <= limit:
        return True
    reason = f"not asked: generating takes {need / 1e9:.1f} GB of memory, and there are {limit / 1e9:.1f} GB"
    report["merge"]["answers"] = reason
    logger.warning("merged model %s", reason)
    return False


def _answer(context: Context, report: dict[str, Any], folder: Path, tokenizer: Any) -> None:
    """Let the merged model answer the prompts too, beside what base and tuned model said."""
    from qlora_trainer.evaluation import answers
    from qlora_trainer.formats import Columns, Encoder
    from qlora_trainer.hardware import DTYPES
    from qlora_trainer.model import load_16bit

    spec = context.spec
    model = load_16bit(folder, context.settings, DTYPES[spec.merge.dtype])
    encoder = Encoder(tokenizer, spec.dataset, Columns(report["data"]["format"], {}))
    ids = [encoder.prompt_ids(entry["prompt"]) for entry in report["prompts"]]
    said = answers(model, tokenizer, ids, spec.evaluation.max_new_tokens)
    for entry, answer in zip(report["prompts"], said, strict=True):
        entry["merged"] = answer


def _write_gguf(
    context: Context, report: dict[str, Any], merged: Path, store: RunStore, *, asks: bool, bos: str | None
) -> tuple[ManifestFile, ...]:
    """Export, try and upload the file for llama.cpp, where one is wanted."""
    from qlora_trainer.tokenizer import trusts_remote_code

    settings, wanted = context.settings, context.spec.merge.gguf
    if wanted is None:
        return ()
    name, base = settings.config.name, short_name(context.spec.model.uri)
    folder, code = _clean(settings.folder(GGUF)), trusts_remote_code(settings)
    path = gguf_export.export(merged, folder, name, wanted.quantization, base=base, trust_remote_code=code)
    if not asks:
        gguf_export.answer(path, "Hello", 1)  # else a file that llama.cpp can't run would be found out by its users
    for entry in report["prompts"] if asks else ():
        entry["gguf"] = gguf_export.answer(path, entry["text"], context.spec.evaluation.max_new_tokens, bos=bos)
    file = store.upload_file(path, f"{GGUF}/{path.name}")
    report["merge"]["gguf"] = {"quantization": wanted.quantization, "file": path.name, "bytes": file.bytes}
    logger.info("GGUF file is in storage", extra={"bytes": file.bytes})
    path.unlink()
    return (file,)


def _retracted(manifest: ArtifactManifest) -> ArtifactManifest:
    """The manifest without the files that a merge writes, and so may replace."""
    files = tuple(file for file in manifest.files if not file.path.startswith(WRITTEN))
    artifacts = manifest.artifacts.model_copy(update={"merged": None, "gguf": None})
    return manifest.model_copy(update={"files": files, "artifacts": artifacts})


def _with_merged(manifest: ArtifactManifest, new: tuple[ManifestFile, ...], store: RunStore) -> ArtifactManifest:
    files = manifest.files + new
    made = {"merged": store.artifact(files, MERGED), "report": store.artifact(files, REPORT)}
    if any(file.path.startswith(f"{GGUF}/") for file in new):
        made["gguf"] = store.artifact(files, GGUF)
    artifacts = manifest.artifacts.model_copy(update=made)
    return manifest.model_copy(update={"files": files, "artifacts": artifacts})


def _clean(folder: Path) -> Path:
    """The folder without what an earlier step in the same work folder left (`qlora run` shares one)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
