"""training.backend: unsloth. Unsloth loads the model and adds the adapter; its kernels run the layers.

Only its public API is called. All else is the hf backend's very code: data, loss, optimizer, evaluation, checkpoints,
adapter files and report. Nothing here is imported from Unsloth before `import_unsloth`: that takes tens of seconds.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from qlora_trainer.libraries import importing_much
from qlora_trainer.settings import Settings
from qlorajob.errors import Reason, StepError
from qlorajob.plan import Plan
from qlorajob.precision import number_types
from qlorajob.spec import LoraSpec, QLoRAJobSpec

if TYPE_CHECKING:
    from qlora_trainer.hardware import Hardware

logger = logging.getLogger(__name__)

FIELD: Final = "training.backend"
FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that Unsloth has layers of its own for, and no rules of its own beside them."""

Checkpointing = Literal[False, True, "unsloth"]


def wanted(spec: QLoRAJobSpec) -> bool:
    """Whether the manifest asks for Unsloth."""
    return spec.training.backend == "unsloth"


def refuse_unsupported(spec: QLoRAJobSpec) -> None:
    """Refuse what Unsloth would do otherwise than the manifest says, or not at all."""
    if importlib.util.find_spec("unsloth") is None:
        raise _refused(FIELD, "this trainer image has no unsloth; set hf, or use an image that has it")
    quantization = spec.quantization
    for field, unsupported, words in (
        ("quantization.type", quantization.type != "nf4", "unsloth quantizes to nf4; set nf4"),
        ("quantization.doubleQuant", not quantization.double_quant, "unsloth always quantizes twice; set true"),
        (
            "training.precision",
            not number_types(spec, "bfloat16").narrow,
            "unsloth computes in one 16-bit type; set this and quantization.computeDtype to auto",
        ),
        ("lora.bias", spec.lora.bias != "none", "unsloth's layers train no biases; set none"),
        ("model.trustRemoteCode", spec.model.trust_remote_code, "unsloth runs no code of a model's own; set false"),
    ):
        if unsupported:
            raise _refused(field, f"{words}, or {FIELD}: hf")


def refuse_model(metadata: Path, spec: QLoRAJobSpec) -> None:
    """Refuse a model that Unsloth doesn't know, or would stretch to longer rows by other rotary embeddings.

    `metadata` is the folder with its config.json, which can be read.
    """
    config = _config(metadata)
    family, longest = config.get("model_type"), config.get("max_position_embeddings")
    if family not in FAMILIES:
        raise _refused(FIELD, f"unsloth has no layers of its own for {family}, only for {', '.join(FAMILIES)}; set hf")
    length = spec.training.max_sequence_length
    if longest is not None and length > longest:
        words = f"unsloth would rescale the positions of a model made for {longest} tokens"
        raise _refused("training.maxSequenceLength", f"{words}; set at most {longest}, or {FIELD}: hf")


def import_unsloth(plan: Plan) -> None:
    """Import Unsloth, which has to come before the libraries that it patches.

    Two of its switches say which of its backends it takes, whatever it finds. The one for GPUs also keeps it from
    writing TRL's trainers anew: ours is derived from TRL's own, whose loss and data are the hf backend's.
    """
    import torch

    on_gpu = plan.gpus > 0 and torch.cuda.is_available()
    os.environ["UNSLOTH_ALLOW_CPU" if on_gpu else "UNSLOTH_FORCE_CPU"] = "1"
    with importing_much(), _prints_as_logs():
        import unsloth  # noqa: F401


def load(folder: Path, tokenizer: Any, settings: Settings, plan: Plan, hardware: Hardware) -> Any:
    """The base model in 4 bit with a fresh adapter, both as Unsloth makes them.

    Raises StepError where the files aren't the model's: Unsloth would fill what they lack with random numbers.
    """
    from unsloth import FastLanguageModel

    from qlora_trainer.model import require_quantized_layers, targets_refused
    from qlora_trainer.rehearsal import require_weights

    require_weights(folder, settings)
    spec, length = settings.spec, settings.spec.training.max_sequence_length
    policy = _checkpointing(plan)
    if plan.checkpointing == "partial":
        hardware.degrade("every layer is checkpointed: unsloth checkpoints all of them or none")
    with _prints_as_logs():
        model, _ = FastLanguageModel.from_pretrained(
            str(folder),
            max_seq_length=length,
            dtype=hardware.compute_dtype,
            load_in_4bit=True,
            use_gradient_checkpointing=policy,
            use_exact_model_name=True,  # else it looks for a copy of the model that is quantized already
            offload_embedding=False,
            tokenizer_name=str(_tokenizer_for_unsloth(tokenizer, folder, settings)),
            fix_tokenizer=False,
            local_files_only=True,
        )
        require_quantized_layers(model)
        try:
            return FastLanguageModel.get_peft_model(
                model,
                r=spec.lora.rank,
                lora_alpha=spec.lora.alpha,
                lora_dropout=spec.lora.dropout,
                target_modules=_targets(spec.lora, model.config.model_type),
                bias="none",
                use_gradient_checkpointing=policy,
                random_state=spec.training.seed,
                max_seq_length=length,
            )
        except ValueError as error:
            raise targets_refused(error) from None


def ready_to_train(model: Any) -> None:
    """Put the model back to training: generating answers switched its checkpointing off and its cache on."""
    from unsloth import FastLanguageModel

    FastLanguageModel.for_training(model)


def _checkpointing(plan: Plan) -> Checkpointing:
    """Unsloth's name for what is planned; `unsloth` parks checkpoints in host memory."""
    if plan.checkpointing == "none":
        return False
    return "unsloth" if plan.offload_checkpoints else True


def _targets(spec: LoraSpec, model_type: str) -> str | list[str]:
    """The layers that get an adapter, as PEFT names them. Unsloth's own default is another than PEFT's."""
    if spec.target_modules == "default":
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        return list(KNOWN[model_type])
    return spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)


def _tokenizer_for_unsloth(tokenizer: Any, model: Path, settings: Settings) -> Path:
    """A folder with a tokenizer that is Unsloth's alone: nobody else reads it.

    Unsloth takes a padding token that also ends texts for a mistake, and adds one to tokenizer and model; of any other
    it sets the embedding to zero, unless the model's config says that it ends texts. So here they have changed places.
    """
    folder, own = settings.folder("unsloth-tokenizer"), copy.deepcopy(tokenizer)
    ends = _config(model).get("eos_token_id") or own.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    own.pad_token = own.convert_ids_to_tokens(ends[0])
    own.eos_token = own.convert_ids_to_tokens(next(number for number in count() if number not in ends))
    own.save_pretrained(str(folder))
    return folder


def _config(folder: Path) -> Mapping[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@contextmanager
def _prints_as_logs() -> Iterator[None]:
    """Send what Unsloth prints through the logs."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            yield
    finally:
        for line in filter(None, map(str.strip, said.getvalue().splitlines())):
            logger.info(line)


def _refused(field: str, words: str) -> StepError:
    return StepError(Reason.UNSUPPORTED, f"{field}: {words}", field=field)
