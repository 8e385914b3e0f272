"""Code that comes with a model and was written for transformers 4, as ChatGLM2's was: what it misses in transformers 5.

Code of this day passes through as it is. transformers looks classes up in two places; what they find is readied there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

OLD_DEFAULTS = {"max_length": 20}
"""What every config had before generation got a config of its own."""


def ready_models() -> None:
    """Let AutoModel build models whose code is old. Imports torch."""
    from transformers.models.auto import auto_factory

    _ready_what_is_found(auto_factory, _ready_model)


def ready_tokenizers() -> None:
    """Let AutoTokenizer build tokenizers whose code is old."""
    from transformers.models.auto import tokenization_auto

    _ready_what_is_found(tokenization_auto, _ready_tokenizer)


def restore_buffers(model: Any, folder: Path) -> None:
    """Give the buffers of a model with its own code the values that the code makes them with, such as rotary angles.

    transformers builds models without memory, and knows what the buffers of its own models hold. Those of others that
    aren't in the files are left with whatever was in the memory that they got.
    """
    if not type(model).__module__.startswith("transformers_modules."):
        return
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    from qlora_trainer.checkpoint_files import Checkpoint

    read = Checkpoint.open(folder).tensors
    with no_init_weights(), init_empty_weights(include_buffers=False):
        twin = type(model)(model.config)
    for name, made in twin.named_buffers():
        if name not in read:
            model.get_buffer(name).copy_(made)


def _ready_what_is_found(module: ModuleType, ready: Callable[[type], type]) -> None:
    find: Any = module.get_class_from_dynamic_module
    if hasattr(find, "readies"):
        return

    @wraps(find)
    def find_ready(*args: Any, **options: Any) -> type:
        return ready(find(*args, **options))

    find_ready.readies = True  # type: ignore[attr-defined]
    module.get_class_from_dynamic_module = find_ready  # type: ignore[attr-defined]


@cache
def _ready_tokenizer(found: type) -> type:
    """Padding by transformers' own method: old ones don't know on which side, and insist on the left."""
    from transformers import PreTrainedTokenizerBase

    pad = getattr(found, "_pad", None)
    if pad is None or "padding_side" in inspect.signature(pad).parameters:
        return found
    return _named_as(found, (found,), _pad=PreTrainedTokenizerBase._pad)


@cache
def _ready_model(found: type) -> type:
    """A model that generates, as all did once; unless it is one of those that say so themselves."""
    from transformers import GenerationMixin

    if issubclass(found, GenerationMixin) or not hasattr(found, "prepare_inputs_for_generation"):
        return found
    return _named_as(found, (_Old, GenerationMixin, found))  # its own methods for generation are for the cache of old


class _Old:
    """Put before a class that derives from PreTrainedModel."""

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        for name, value in OLD_DEFAULTS.items():
            if not hasattr(config, name):
                setattr(type(config), name, value)
        super().__init__(config, *args, **options)  # type: ignore[call-arg]
        if not hasattr(self, "all_tied_weights_keys"):
            self.post_init()  # type: ignore[attr-defined]

    def generate(self, *args: Any, generation_config: Any, **options: Any) -> Any:
        """Every token from all before it: the code keeps its cache in a form that isn't there any more."""
        generation_config.use_cache = False
        return super().generate(*args, generation_config=generation_config, **options)  # type: ignore[misc]


def _named_as(found: type, bases: tuple[type, ...], **members: Any) -> type:
    """A class made from another one, by whose name and file it is saved."""
    return type(found.__name__, bases, {"__module__": found.__module__, "__qualname__": found.__qualname__, **members})
