"""The tokenizer, as prepare, train and merge all use it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qlora_trainer.remote_code import ready_tokenizers
from qlora_trainer.settings import Settings
from qlorajob.errors import Reason, StepError, first_line


def load_tokenizer(folder: Path, settings: Settings) -> Any:
    """The model's tokenizer, padding on the right with a token that exists.

    A model without a pad token, or without a vector for it, pads with its end-of-text token. That is safe here, because
    padding is masked by its position: an end of text that is really there is still learnt.
    """
    from transformers import AutoTokenizer

    ready_tokenizers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trusts_remote_code(settings))
    except Exception as error:  # code of the model's own can fail in any way
        message = f"model.uri: {settings.spec.model.uri} has no usable tokenizer: {first_line(error)}"
        raise StepError(Reason.MODEL_INVALID, message, field="model.uri") from None
    if tokenizer.eos_token is None:
        message = f"model.uri: the tokenizer of {settings.spec.model.uri} has no end-of-text token"
        raise StepError(Reason.MODEL_INVALID, message, field="model.uri")
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= _vectors(folder, settings):
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _vectors(folder: Path, settings: Settings) -> float:
    """Tokens that the model has a vector for, as its config says."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trusts_remote_code(settings))
    return getattr(config.get_text_config(), "vocab_size", None) or math.inf


def trusts_remote_code(settings: Settings) -> bool:
    """Whether Python code beside the weights may run: the manifest and the operator's policy must both say so."""
    return settings.spec.model.trust_remote_code and settings.config.allow_remote_code
