"""Loading a model without its weights' values: whether its files hold what it is made of, before they are read.

While it quantizes, transformers compares no shapes. What the files lack, it fills with random numbers.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_trainer.checkpoint_files import Checkpoint
from qlora_trainer.settings import Settings
from qlora_trainer.tokenizer import trusts_remote_code
from qlorajob.errors import Reason, StepError, first_line

logger = logging.getLogger(__name__)

FIELD = "model.uri"
META = torch.device("meta")


def require_weights(folder: Path, settings: Settings) -> None:
    """Refuse weights that can't be read, lack a part of the model, or are of other shapes than its config.json says.

    transformers itself is asked, with the tensors' names and shapes alone: it knows which are renamed, tied or put
    together from several. That takes a tenth of a second for 8B.
    """
    uri = settings.spec.model.uri
    tensors = {info.name: torch.empty(info.shape, dtype=info.dtype, device=META) for info in _tensors(folder, uri)}
    trusted = trusts_remote_code(settings)
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trusted)
    with META:
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trusted))
    try:
        loaded, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            dtype=torch.bfloat16,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError as error:  # of tensors that it couldn't put together; its report is in the log
        raise _refused(f"the weights of {uri} don't make a {config.model_type}: {first_line(error)}") from None
    _require_same_shapes(found["mismatched_keys"], uri)
    _require_all(found["missing_keys"] & {name for name, _ in loaded.named_parameters()}, uri)


def _tensors(folder: Path, uri: str) -> Iterable[Any]:
    try:
        return Checkpoint.open(folder).tensors.values()
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise _refused(f"the weights of {uri} can't be read: {first_line(error)}") from None


def _require_same_shapes(differing: Iterable[tuple[str, Iterable[int], Iterable[int]]], uri: str) -> None:
    for name, found, expected in sorted(differing):
        raise _refused(
            f"the weights of {uri} aren't those of its config.json: {name} is {_shape(found)}, and should be "
            f"{_shape(expected)}"
        )


def _require_all(missing: set[str], uri: str) -> None:
    if missing:
        more = f" and {len(missing) - 1} more that its config.json asks for" if len(missing) > 1 else ""
        raise _refused(f"{uri} lacks weights: there is no {min(missing)}{more}")


def _shape(sizes: Iterable[int]) -> str:
    return "×".join(map(str, sizes)) or "a number"


def _refused(words: str) -> StepError:
    return StepError(Reason.MODEL_INVALID, f"{FIELD}: {words}", field=FIELD)
