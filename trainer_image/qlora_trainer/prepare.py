"""prepare: everything that can be found out without a GPU, so that no GPU waits for a typing error.

Checks the output, the model and the data, names the run, counts its steps; and notices when it is already done.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from qlora_trainer import gguf_export, merge, unsloth_backend
from qlora_trainer.artifacts import RunStore, check_output, open_output
from qlora_trainer.checkpoints import conclude, is_concluded
from qlora_trainer.clock import Clock
from qlora_trainer.context import Context
from qlora_trainer.data import TrainingData, load_data
from qlora_trainer.model_facts import inspect_model, read_config
from qlora_trainer.model_source import open_model
from qlora_trainer.patience import while_it_answers
from qlora_trainer.tokenizer import load_tokenizer, trusts_remote_code
from qlora_vram.positions import longest_row
from qlorajob import identity
from qlorajob.errors import Reason, StepError
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import Prepared

logger = logging.getLogger(__name__)


def run(context: Context) -> None:
    """Prepare a run."""
    settings, spec = context.settings, context.spec
    refuse_unsupported(spec)
    clock = Clock(logger)

    output = while_it_answers(open_output(settings), context.stop)
    check_output(output)
    clock.lap("output")

    source = open_model(settings)
    clock.lap("model")

    facts = inspect_model(source, settings)
    if unsloth_backend.wanted(spec):
        unsloth_backend.refuse_model(source.metadata_folder(), spec)
    tokenizer = load_tokenizer(source.metadata_folder(), settings)
    clock.lap("facts")

    if spec.merge.gguf is not None:
        scratch, code = settings.folder("gguf"), trusts_remote_code(settings)
        gguf_export.check(source.metadata_folder(), scratch, trust_remote_code=code)
        clock.lap("gguf")

    data = load_data(settings, tokenizer)
    # Or the template would refuse a prompt after the GPU is taken.
    prompts = [data.encoder.prompt_ids(prompt) for prompt in spec.evaluation.prompts]
    require_questions(prompts)
    require_vectors(data, prompts, tokenizer, facts.vocabulary)
    require_positions(data, prompts, longest_row(read_config(source.metadata_folder(), spec.model.uri)), spec)
    clock.lap("data")

    run_id = identity.run_id(spec, model_revision=source.revision, dataset_digest=data.digest)
    store = RunStore(output, run_id)
    manifest = store.manifest()
    if manifest is not None and not is_concluded(store):
        conclude(store, manifest)  # its process was killed just before, and nobody may train this run again
    merged = manifest is not None and merge.is_done(manifest, store.report(), spec.merge)
    if manifest is None and settings.cache_dir is not None:
        source.weights_folder()  # into the shared volume, while no GPU waits
        clock.lap("weights")
    context.outcome.prepared = Prepared(
        key=settings.config.key,
        run_id=run_id,
        model_revision=source.revision,
        dataset_digest=data.digest,
        train_rows=len(data.train.documents),
        validation_rows=len(data.validation.documents) if data.validation else 0,
        dropped_rows=data.dropped_rows,
        data=data.summary if manifest is None else None,  # the finished run's report says it
        train_tokens=data.train.tokens,
        total_steps=data.total_steps(spec),
        facts=facts,
        artifacts=manifest.artifacts if manifest else None,
        promoted=manifest.promoted if manifest else None,
        merge_key=identity.merge_key(spec) if merged else None,
    )
    if manifest is not None:
        context.outcome.reason = Reason.ALREADY_TRAINED
        context.outcome.message = f"run {run_id} is already in {output.uri}: nothing to train"
    else:
        context.outcome.message = _summary(context.outcome.prepared)


def refuse_unsupported(spec: QLoRAJobSpec) -> None:
    """Refuse what the API has a field for but this version can't do yet."""
    if unsloth_backend.wanted(spec):
        unsloth_backend.refuse_unsupported(spec)
    if isinstance(spec.resources.gpus, int) and spec.resources.gpus > 1:
        message = "resources.gpus: training on several GPUs comes with a later version; set 1 or auto"
        raise StepError(Reason.UNSUPPORTED, message, field="resources.gpus")


def require_questions(prompts: Sequence[Sequence[int]]) -> None:
    """Refuse a prompt of which nothing reaches the model, as with a template that begins with the output."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            message = (
                f"evaluation.prompts[{number}]: the model would read nothing of it: either it has no words, or "
                "dataset.template has nothing before its output; drop the prompts, or change the template"
            )
            raise StepError(Reason.TEMPLATE_INVALID, message, field="evaluation.prompts")


def require_vectors(data: TrainingData, prompts: Sequence[Sequence[int]], tokenizer: Any, vocabulary: int) -> None:
    """Refuse a tokenizer that got tokens which the model didn't: a GPU only says that an assertion failed."""
    largest = max(corpus.largest_token for corpus in (data.train, data.validation) if corpus is not None)
    largest = max(largest, *(token for prompt in prompts for token in prompt), 0)
    if 0 < vocabulary <= largest:
        message = (
            f"model.uri: the tokenizer makes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the "
            f"model's embeddings end at {vocabulary - 1}: give the model with the tokenizer that it was trained with"
        )
        raise StepError(Reason.MODEL_INVALID, message, field="model.uri")


def require_positions(
    data: TrainingData, prompts: Sequence[Sequence[int]], longest: int | None, spec: QLoRAJobSpec
) -> None:
    """Refuse rows and answers that are longer than the model's table of positions: a GPU only says likewise."""
    if longest is None:
        return
    row = max(int(corpus.lengths.max()) for corpus in (data.train, data.validation) if corpus is not None)
    if row > longest:
        field, problem = "training.maxSequenceLength", f"a row has {row} tokens"
        advice = f"set {longest} or less: longer rows are cut then"
        raise _beyond(field, problem, longest, advice)
    asked = max((len(prompt) for prompt in prompts), default=0)
    if asked and asked + spec.evaluation.max_new_tokens > longest:
        field, problem = (
            "evaluation.maxNewTokens",
            f"a prompt has {asked} tokens, with {spec.evaluation.max_new_tokens} to come",
        )
        raise _beyond(field, problem, longest, "set less, or shorten the prompt")


def _beyond(field: str, problem: str, longest: int, advice: str) -> StepError:
    message = f"{field}: {problem}, but the model has positions for {longest} only; {advice}"
    return StepError(Reason.UNSUPPORTED, message, field=field)


def _summary(prepared: Prepared) -> str:
    held_out = f", {prepared.validation_rows} held out" if prepared.validation_rows else ""
    reasons = prepared.data.dropped.items() if prepared.data else ()
    dropped = f", dropped: {', '.join(f'{count} {reason}' for reason, count in reasons)}" if reasons else ""
    return (
        f"run {prepared.run_id}: {prepared.facts.parameters / 1e6:.0f} M parameters, {prepared.train_rows} rows"
        f"{held_out}{dropped}, {prepared.train_tokens} tokens, {prepared.total_steps} steps"
    )
