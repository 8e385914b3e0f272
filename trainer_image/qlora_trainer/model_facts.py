"""What prepare learns of a model from its config, without loading weights: facts for the plan, and early refusals."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from qlora_trainer.libraries import import_bitsandbytes, import_transformers, importing_much
from qlora_trainer.model_source import ModelSource
from qlora_trainer.packing import packing_refused
from qlora_trainer.settings import Settings
from qlora_trainer.tokenizer import trusts_remote_code
from qlora_vram.facts import Blueprint, InvalidConfigError, blueprint
from qlorajob.errors import Reason, StepError, first_line
from qlorajob.plan import ModelFacts
from qlorajob.spec import QLoRAJobSpec

MAX_NAMES_IN_MESSAGE = 24


class Outline(Protocol):
    """Which modules a model has, and how large they are."""

    def facts(self, weight_bytes: int) -> ModelFacts:
        """Counts by kind."""

    def linear_paths(self) -> tuple[str, ...]:
        """Module paths of its linear layers, the output head's included."""

    def head_path(self) -> str:
        """Module path of the output head."""


def inspect_model(source: ModelSource, settings: Settings) -> ModelFacts:
    """Facts of the model; refuses one that can't be trained as the manifest asks.

    Most models are known by their config.json alone, so that no pod spends seconds on importing torch. One that isn't,
    or that brings code of its own, is built without weights and looked at.
    """
    folder = source.metadata_folder()
    raw = read_config(folder, settings.spec.model.uri)
    known = _known(raw, settings)
    own_code = _is_replaced(raw, settings) or (
        trusts_remote_code(settings) and any(name.endswith(".py") for name in source.files.metadata)
    )
    mixture = known is not None and known.facts(0).expert_parameters > 0
    import_transformers(with_torch=known is None or own_code or mixture)
    _check_remote_code(raw, settings)
    config = _load_config(folder, settings)
    model = _outline(known, raw, config, settings)
    source.files.check_layers(settings.spec.model.uri, folder, model.linear_paths(), source.start_of)
    _check_target_modules(model, str(raw.get("model_type", "")), settings.spec)
    _check_packing(model, settings.spec)
    if mixture:
        _check_experts(config, settings)
    return model.facts(source.files.weight_bytes)


def _known(raw: dict[str, Any], settings: Settings) -> Blueprint | None:
    """How the model is built, where its config.json is enough to tell."""
    try:
        found = blueprint(raw)
    except InvalidConfigError as error:
        raise _unreadable(error, settings) from None
    return None if found is None or (_is_replaced(raw, settings) and not found.family.remote_code) else found


def _is_replaced(raw: dict[str, Any], settings: Settings) -> bool:
    """Whether transformers' classes give way to code of the model's own, which may build something else."""
    return trusts_remote_code(settings) and "auto_map" in raw


def _outline(known: Blueprint | None, raw: dict[str, Any], config: Any, settings: Settings) -> Outline:
    """The model, built where config.json isn't enough. Code of its own is built in any case, to see that it runs."""
    replaced = _is_replaced(raw, settings)
    if known is not None and not replaced:
        return known
    built = _meta_model(config, settings, own_code=replaced)
    return known or built


def read_config(folder: Path, uri: str) -> dict[str, Any]:
    """A model's config.json. Raises StepError where it is none, or one of a model that is quantized already."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        message = f"model.uri: config.json of {uri} isn't valid JSON"
        raise StepError(Reason.MODEL_INVALID, message, field="model.uri")
    if config.get("quantization_config"):
        message = (
            f"model.uri: the weights of {uri} are already quantized; QLoRA quantizes by itself: "
            "name the original 16-bit model"
        )
        raise StepError(Reason.MODEL_INVALID, message, field="model.uri")
    return config


def _check_remote_code(raw: dict[str, Any], settings: Settings) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    spec = settings.spec
    field = "model.trustRemoteCode"
    if spec.model.trust_remote_code and not settings.config.allow_remote_code:
        message = f"{field}: this cluster's operator doesn't allow remote code (its policy allowRemoteCode is false)"
        raise StepError(Reason.REMOTE_CODE_REFUSED, message, field=field)
    needed = "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING_NAMES
    if not needed:
        return
    if not spec.model.trust_remote_code:
        message = (
            f"{field}: {spec.model.uri} ({raw.get('model_type')}) runs only with Python code that comes with it; "
            "read that code, then set this to true"
        )
        raise StepError(Reason.REMOTE_CODE_REFUSED, message, field=field)
    if spec.training.packing:
        raise packing_refused("a model with its own code may let packed rows see each other")


def _load_config(folder: Path, settings: Settings) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trusts_remote_code(settings))
    except Exception as error:  # code of the model's own can fail in any way
        raise _unreadable(error, settings) from None


def _unreadable(error: Exception, settings: Settings) -> StepError:
    message = f"model.uri: the config of {settings.spec.model.uri} can't be read: {first_line(error)}"
    return StepError(Reason.MODEL_INVALID, message, field="model.uri")


def _meta_model(config: Any, settings: Settings, *, own_code: bool) -> Outline:
    from qlora_trainer.meta_model import MetaModel

    try:
        return MetaModel(config, trust_remote_code=trusts_remote_code(settings))
    except Exception as error:  # likewise
        if own_code:
            problem = f"can't be built by the code that comes with it: {type(error).__name__}"
        elif isinstance(error, ValueError | ImportError):
            problem = "isn't a causal language model"
        else:
            raise
        message = f"model.uri: {settings.spec.model.uri} ({config.model_type}) {problem}: {first_line(error)}"
        raise StepError(Reason.MODEL_INVALID, message, field="model.uri") from None


def _check_target_modules(model: Outline, model_type: str, spec: QLoRAJobSpec) -> None:
    """Every name in lora.targetModules must match a layer: PEFT is content when any of them does."""
    field = "lora.targetModules"
    wanted = spec.lora.target_modules
    if wanted == "all-linear":
        return
    if wanted == "default":
        if not _has_default_targets(model, model_type):
            message = f"{field}: PEFT has no default layers for {model_type}; set all-linear or name the layers"
            raise StepError(Reason.TARGET_MODULES_NOT_FOUND, message, field=field)
        return
    layers, head = model.linear_paths(), model.head_path()
    absent = [name for name in wanted if not any(_is_target(layer, name) for layer in layers)]
    if absent:
        there = _short_names(layer for layer in layers if layer != head)
        message = f"{field}: the model has no linear layer {', '.join(absent)}; it has {there}"
        raise StepError(Reason.TARGET_MODULES_NOT_FOUND, message, field=field)
    heads = [name for name in wanted if head and _is_target(head, name)]
    if heads:
        message = f"{field}: {heads[0]} is the output head, which stays as it is; take it off the list"
        raise StepError(Reason.UNSUPPORTED, message, field=field)


def _check_experts(config: Any, settings: Settings) -> None:
    """PEFT decides by the modules whether experts get an adapter, and refuses some; so it is asked."""
    with importing_much():
        import_bitsandbytes()
        from qlora_trainer.meta_model import MetaModel

    model = MetaModel(config, trust_remote_code=trusts_remote_code(settings))
    if model.adapts_experts(settings.spec.lora) and settings.spec.merge.enabled:
        message = (
            "merge.enabled: an adapter on experts can't be merged; set false and load it beside the base, or name "
            "other layers in lora.targetModules"
        )
        raise StepError(Reason.UNSUPPORTED, message, field="merge.enabled")


def _check_packing(model: Outline, spec: QLoRAJobSpec) -> None:
    """Refuse here what is known. Of other models train finds out, before its first step."""
    if spec.training.packing and isinstance(model, Blueprint) and not model.family.packs:
        raise packing_refused()


def _has_default_targets(model: Outline, model_type: str) -> bool:
    if isinstance(model, Blueprint):
        return bool(model.family.lora_default)
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    return model_type in KNOWN


def _is_target(layer: str, name: str) -> bool:
    """PEFT's rule for a list of names."""
    return layer == name or layer.endswith(f".{name}")


def _short_names(layers: Iterable[str]) -> str:
    names = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
    more = ", …" if len(names) > MAX_NAMES_IN_MESSAGE else ""
    return ", ".join(names[:MAX_NAMES_IN_MESSAGE]) + more
