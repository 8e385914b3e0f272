"""The adapter, added to the base model's weights by the names that the base's files use.

transformers says which tensor of a file is which parameter of the model, PEFT says what each adapted layer adds to it;
the model itself exists without memory for its weights. So any model can be merged, a tensor at a time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from qlora_trainer.checkpoint_files import Checkpoint, TensorInfo
from qlora_trainer.remote_code import ready_models
from qlorajob.errors import Reason, StepError

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_NAME = "default"
NAMES_IN_MESSAGE = 3
_LORA_WEIGHT = re.compile(r"\.(lora_[AB])\.weight$")


@dataclass(frozen=True, slots=True)
class Merge:
    """How each tensor of the base's files becomes one of the merged model's."""

    checkpoint: Checkpoint
    tensors: tuple[TensorInfo, ...]
    """The merged model's tensors: the base's, in its order and by its names, in their new types."""
    layers: Mapping[str, LoraLayer]
    """Adapted layers, by the name of their weight in the base's files."""
    biases: Mapping[str, torch.Tensor]
    """Parameters that were trained themselves (lora.bias), by their names in the base's files."""

    @property
    def bytes(self) -> int:
        """Size of the merged model."""
        return sum(tensor.bytes for tensor in self.tensors)

    def compute(self, tensor: TensorInfo) -> torch.Tensor:
        """The merged model's values of a tensor: added up in float32, rounded once.

        Raises StepError when weights aren't numbers, or are too large for their new type.
        """
        trained = self.biases.get(tensor.name)
        value = self.checkpoint.read(tensor.name) if trained is None else trained.detach()
        layer = self.layers.get(tensor.name)
        if layer is not None:
            with torch.no_grad():
                value = layer.get_delta_weight(ADAPTER_NAME).float().add_(value)
        result = value.to(tensor.dtype)
        if layer is not None or result.dtype != value.dtype:
            _require_numbers(tensor, value, result, adapted=layer is not None)
        return result


def plan_merge(base: Path, adapter: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> Merge:
    """Match base and adapter. Raises StepError unless every part of the adapter finds its tensor in the base's files.

    Args:
        base: folder of the original model, in 16 bit or more.
        adapter: folder of a LoRA adapter in PEFT's layout.
        dtype: type of the merged floating-point weights; those that the model keeps in float32 stay so.
        trust_remote_code: whether code in the base's folder may run.
    """
    ready_models()
    checkpoint = Checkpoint.open(base)
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.to("meta")  # code of a model's own may take memory all the same (torch's skip_init does)
    parameters = _parameters_by_key(model, checkpoint.tensors, dtype)
    tensors = tuple(
        TensorInfo(info.name, _dtype_of(info, parameters.get(info.name)), info.shape)
        for info in checkpoint.tensors.values()
    )
    tuned = _load_adapter(model, adapter)
    keys = {parameter.name: key for key, parameter in parameters.items()}
    return Merge(checkpoint, tensors, *_adapted(tuned, keys))


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter or buffer of the model that one tensor of the files becomes."""

    name: str
    dtype: torch.dtype


def _parameters_by_key(model: Any, keys: Iterable[str], dtype: torch.dtype) -> dict[str, _Parameter]:
    """The model's parameter for each tensor of the files: what transformers' loader does with their names.

    Left out is what the model doesn't know, and what it makes from several tensors or from a part of one (experts).
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known = model.state_dict()
    plan = model._get_dtype_plan(dtype)
    kept, by_group, _ = build_glob_alternation(list(plan))

    found = {}
    for key in sorted(keys, key=dot_natural_key):
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, converted = key, None
        if name not in known or converted is not None:
            continue
        match = kept.search(name) if plan else None
        found[key] = _Parameter(name, plan[by_group[str(match.lastgroup)]] if match else known[name].dtype)
    return found


def _dtype_of(info: TensorInfo, parameter: _Parameter | None) -> torch.dtype:
    """The type a tensor is written in. What the model doesn't know, and what isn't floating-point, stays as it is."""
    return parameter.dtype if parameter is not None and info.dtype.is_floating_point else info.dtype


def _load_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter inside. Only what the adapter's file holds has values: nothing else has any memory.

    PEFT's own loader would send the adapter to where the layers are, that is nowhere.
    """
    config = LoraConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # the manifest's URI; PEFT would warn that the base has moved
    peft = get_peft_model(model, config, low_cpu_mem_usage=True)
    weights = {
        _LORA_WEIGHT.sub(rf".\1.{ADAPTER_NAME}.weight", name): value
        for name, value in load_file(folder / ADAPTER_WEIGHTS).items()
    }
    try:
        strangers = peft.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:  # a tensor of another shape
        strangers = str(error).splitlines()[1:]
    tuned = peft.get_base_model()
    empty = [name for name, parameter in tuned.named_parameters() if parameter.is_meta and _is_lora(name)]
    if strangers or empty:
        message = f"the adapter in storage doesn't belong to this base model: look at {[*strangers, *empty][0].strip()}"
        raise StepError(Reason.MODEL_INVALID, message, field="model.uri")
    return tuned


def _adapted(tuned: Any, keys: Mapping[str, str]) -> tuple[dict[str, LoraLayer], dict[str, torch.Tensor]]:
    layers = {f"{name}.weight": module for name, module in tuned.named_modules() if isinstance(module, LoraLayer)}
    biases = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in tuned.named_parameters()
        if not parameter.is_meta and not _is_lora(name)
    }
    lost = sorted((layers.keys() | biases.keys()) - keys.keys())
    if lost:
        more = f" and {len(lost) - NAMES_IN_MESSAGE} more" if len(lost) > NAMES_IN_MESSAGE else ""
        message = (
            f"merge: the adapter changes {', '.join(lost[:NAMES_IN_MESSAGE])}{more}, which the base model's files hold "
            "in another form; the adapter can't be merged: set merge.enabled: false and load it beside the base"
        )
        raise StepError(Reason.UNSUPPORTED, message, field="merge.enabled")
    logger.info("matched", extra={"layers": len(layers), "biases": len(biases)})
    return (
        {keys[name]: layer for name, layer in layers.items()},
        {keys[name]: parameter for name, parameter in biases.items()},
    )


def _is_lora(name: str) -> bool:
    return ".lora_" in name


def _require_numbers(tensor: TensorInfo, value: torch.Tensor, result: torch.Tensor, *, adapted: bool) -> None:
    if _all_numbers(result):
        return
    if _all_numbers(value):
        name = str(tensor.dtype).removeprefix("torch.")
        message = f"merge.dtype: {tensor.name} has weights that {name} can't hold; set bfloat16"
        raise StepError(Reason.INVALID_SPEC, message, field="merge.dtype")
    if adapted:
        message = f"{tensor.name} isn't made of numbers after the merge: base or adapter is broken"
        raise StepError(Reason.MODEL_INVALID, message)


def _all_numbers(tensor: torch.Tensor) -> bool:
    """Whether there is neither infinity nor NaN. Minimum and maximum pass both on, and are 40 times faster to find."""
    if tensor.numel() == 0:
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
