"""Hugging Face's libraries, imported as a step needs them."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from qlora_trainer import logs

NOT_USED = frozenset(
    {
        "PIL", "av", "cv2", "decord", "librosa", "nibabel", "pdfplumber", "soundfile", "timm", "torchaudio",
        "torchcodec", "torchvision",
        "flax", "jax", "jaxlib", "keras", "mlx", "tensorflow", "tf_keras",
        "faiss", "nltk", "scipy", "sentence_transformers", "sklearn",
        "aim", "clearml", "codecarbon", "comet_ml", "dvclive", "matplotlib", "mlflow", "neptune", "swanlab",
        "trackio", "wandb", "weave",
        "optuna", "ray", "sigopt",
        "aqlm", "auto_gptq", "auto_round", "awq", "compressed_tensors", "eetq", "fbgemm_gpu", "gptqmodel",
        "hqq", "optimum", "quark", "torchao", "vptq",
        "apex", "deepspeed", "diffusers", "kernels", "liger_kernel", "megatron", "mergekit", "msamp",
        "transformer_engine", "unsloth", "vllm", "xformers",
        "habana_frameworks", "intel_extension_for_pytorch", "sagemaker", "smdistributed",
        "torch_mlu", "torch_musa", "torch_npu", "torch_sdaa", "torch_xla", "torchdistx",
    }
)  # fmt: skip
"""Packages that the libraries look for, some of which they import only because they are installed: other media, other
frameworks, statistics, trackers, searches for hyperparameters, quantizers, engines, accelerators. The trainer uses none
and its own image has none; in another image they could take longer to import than all that is needed.
"""


@contextmanager
def as_if_absent(names: Iterable[str]) -> Iterator[None]:
    """Let these packages be absent: importing one fails, and whoever asks is told that it isn't installed.

    What is imported already stays. A library that has asked may remember the answer for the life of the process.
    """
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say that there is no such module
    # transformers and trl ask which distribution each package is from; the answer is read from every one's metadata.
    distributions = functools.cache(importlib.metadata.packages_distributions)
    try:
        with patch.object(importlib.metadata, "packages_distributions", distributions):
            yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


@contextmanager
def importing_much() -> Iterator[None]:
    """Import without the garbage collector, which goes through the same objects again and again: a tenth of the time.

    Modules stay for the life of the process, so it needn't look at them afterwards either.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def import_transformers(*, with_torch: bool) -> None:
    """Import transformers and send its logs through ours.

    Without torch there are tokenizers and configs, but no models, as where torch isn't installed: that takes a second
    where torch takes five. Once transformers is imported, it stays as it is for the life of the process.
    """
    with importing_much():
        if not with_torch and not {"torch", "transformers"} & sys.modules.keys():
            _import_as_if_torch_were_absent()
        logs.tame_libraries()


def _import_as_if_torch_were_absent() -> None:
    """transformers asks once whether torch is there, and remembers the answer."""
    with as_if_absent(["torch"]):
        with patch.dict(os.environ, TRANSFORMERS_NO_ADVISORY_WARNINGS="1"):  # it would advise to install torch
            from transformers.utils import is_torch_available
        is_torch_available()


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
