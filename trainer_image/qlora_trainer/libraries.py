"""Hugging Face's libraries, imported as a step needs them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from qlora_trainer import logs


def import_transformers(*, with_torch: bool) -> None:
    """Import transformers and send its logs through ours.

    Without torch there are tokenizers and configs, but no models, as where torch isn't installed: that takes a second
    where torch takes five. Once transformers is imported, it stays as it is for the life of the process.
    """
    if not with_torch and not {"torch", "transformers"} & sys.modules.keys():
        _import_as_if_torch_were_absent()
    logs.tame_libraries()


def _import_as_if_torch_were_absent() -> None:
    """transformers asks once whether torch is there, and remembers the answer."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say that there is no such module
    with patch.dict(os.environ, TRANSFORMERS_NO_ADVISORY_WARNINGS="1"):  # it would advise to install torch
        from transformers.utils import is_torch_available
    is_torch_available()
    del sys.modules["torch"]


def import_bitsandbytes() -> None:
    """Import bitsandbytes, which peft imports as well, without loading torch's compiler.

    It decorates a few functions with torch.compile, for devices that it has no kernels for. The decorator loads the
    whole compiler at once, which takes seconds; here each function is compiled when it is called first.
    """
    if "bitsandbytes" in sys.modules:
        return
    import torch

    with patch.object(torch, "compile", functools.partial(_compile_at_first_call, torch.compile)):
        import bitsandbytes  # noqa: F401


def _compile_at_first_call(
    compiler: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """torch.compile as a decorator, with or without options."""
    if function is None:
        return functools.partial(_compile_at_first_call, compiler, **options)
    compiled = functools.cache(functools.partial(compiler, function, **options))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
