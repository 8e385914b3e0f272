"""The model that is trained: the base in 4 bit, with an adapter. And the base in 16 bit, for the merge."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer.hardware import Hardware
from qlora_trainer.packing import packing_refused
from qlora_trainer.quirks import let_falcon_be_quantized, tell_output_head
from qlora_trainer.rehearsal import require_weights
from qlora_trainer.remote_code import ready_models, restore_buffers
from qlora_trainer.settings import Settings
from qlora_trainer.staging import staged_loading
from qlora_trainer.tokenizer import trusts_remote_code
from qlorajob.errors import Reason, StepError, first_line
from qlorajob.spec import LoraSpec, QuantizationSpec

logger = logging.getLogger(__name__)


def load_quantized(folder: Path, settings: Settings, hardware: Hardware) -> Any:
    """The base model in 4 bit, frozen. What stays in 16 bit (embeddings, norms, head) has the compute dtype.

    Raises StepError where the files aren't the model's, and where not one layer is in 4 bit.
    """
    let_falcon_be_quantized()
    ready_models()
    require_weights(folder, settings)
    with staged_loading(on_gpu=hardware.on_gpu):
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            quantization_config=quantization_config(settings.spec.quantization, hardware),
            dtype=hardware.compute_dtype,  # else some models come as float32
            device_map={"": 0 if hardware.on_gpu else "cpu"},
            trust_remote_code=trusts_remote_code(settings),
        )
    restore_buffers(model, folder)
    tell_output_head(model)
    require_quantized_layers(model)
    _keep_cpu_weights_trainable(model)
    model.config.use_cache = False
    if getattr(model.config, "pretraining_tp", 1) != 1:
        model.config.pretraining_tp = 1  # else Llama-2 computes slices, more slowly
    return model


def quantization_config(spec: QuantizationSpec, hardware: Hardware) -> BitsAndBytesConfig:
    """How bitsandbytes holds the base model."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.type,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=hardware.compute_dtype,
    )


def load_16bit(folder: Path, settings: Settings, dtype: torch.dtype) -> Any:
    """The base model as it was published, on the CPU."""
    ready_models()
    model = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=dtype,
        device_map={"": "cpu"},
        trust_remote_code=trusts_remote_code(settings),
    )
    restore_buffers(model, folder)
    return model


def add_adapter(model: Any, spec: LoraSpec) -> Any:
    """The model with a fresh LoRA adapter, the only part that is trained. Its weights are float32.

    Its second matrix starts as zero, so until the first step the model answers exactly as the base does.
    """
    try:
        return get_peft_model(model, lora_config(spec))
    except ValueError as error:
        raise targets_refused(error) from None


def require_numbers(model: Any, step: int) -> None:
    """Raise StepError when the training has spoilt the adapter: one weight that isn't a number spoils every answer."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            message = (
                f"the training diverged: {name} isn't made of numbers any more by step {step}; "
                "lower training.learningRate, or set training.maxGradNorm or warmupSteps"
            )
            raise StepError(Reason.DIVERGED, message, field="training.learningRate")


def targets_refused(error: ValueError) -> StepError:
    """The error that says to the user that PEFT finds no such layers, or won't have them as the manifest has."""
    if "lora_dropout" in str(error):
        message = (
            "lora.dropout: PEFT adapts the experts of this model without dropout only; set 0, or name other layers in "
            "lora.targetModules"
        )
        return StepError(Reason.UNSUPPORTED, message, field="lora.dropout")
    message = f"lora.targetModules: PEFT refuses: {first_line(error)}"
    return StepError(Reason.TARGET_MODULES_NOT_FOUND, message, field="lora.targetModules")


def lora_config(spec: LoraSpec) -> LoraConfig:
    """PEFT's description of the adapter. Without target modules, PEFT takes those it knows for the model's family."""
    targets: str | list[str] | None = None if spec.target_modules == "default" else spec.target_modules  # type: ignore[assignment]
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        bias=spec.bias,
        task_type="CAUSAL_LM",
    )


def require_isolated_documents(model: Any) -> None:
    """Refuse to pack for a model in which packed documents would see each other.

    Tried on the loaded model, since no list of architectures would be complete: of two documents in one sequence the
    first is changed, and the second's logits must not move.
    """
    training = model.training
    model.eval()
    try:
        one, other = _second_logits(model, first_token=1), _second_logits(model, first_token=2)
        # Equal to the bit, but for mixtures of experts, whose products change shape with the first document.
        noise = 4 * torch.finfo(one.dtype).eps * one.abs().max()
        isolated = bool((one - other).abs().max() <= noise)
    except TypeError:  # no position_ids: nothing tells this model where a document starts
        isolated = False
    model.train(training)
    if not isolated:
        raise packing_refused()


def _second_logits(model: Any, *, first_token: int, length: int = 8) -> torch.Tensor:
    """Logits of the second of two packed documents, the first of which starts with `first_token`."""
    first, second = torch.arange(first_token, first_token + length), torch.arange(3, 3 + length)
    ids = torch.cat([first, second]) % model.config.get_text_config().vocab_size
    positions = torch.arange(length).repeat(2)
    with torch.no_grad():
        output = model(
            input_ids=ids[None].to(model.device), position_ids=positions[None].to(model.device), use_cache=False
        )
    return output.logits[0, length:]  # type: ignore[no-any-return]


def require_quantized_layers(model: Any) -> None:
    """Refuse a model that stayed in 16 bit as a whole: it would train, in four times the memory that was planned."""
    if any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules()):
        return
    head = model.get_output_embeddings()
    classes = {
        type(module).__name__
        for module in model.modules()
        if module is not head
        and not isinstance(module, torch.nn.Embedding)
        and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    }
    message = (
        "model.uri: bitsandbytes can't hold this model in 4 bit: it replaces torch.nn.Linear and Conv1D, and no class "
        f"derived from them; the model's weights are in {', '.join(sorted(classes)) or 'no linear layers'}"
    )
    raise StepError(Reason.UNSUPPORTED, message, field="model.uri")


def _keep_cpu_weights_trainable(model: Any) -> None:
    """Stop bitsandbytes from repacking weights at the first evaluation on a CPU with AVX512-BF16.

    The repacked layout has no backward pass: an evaluation before training would silently cut off all gradients.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def describe(model: Any, spec: QuantizationSpec) -> dict[str, Any]:
    """What the loaded model really is, read from its modules: for the report, as evidence rather than intent."""
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    parameters = list(model.parameters())
    states = [layer.weight.quant_state for layer in layers if layer.weight.quant_state is not None]
    return {
        "modules": _classes_with_weights(model),
        "trainableParameters": sum(p.numel() for p in parameters if p.requires_grad),
        "quantizedParameters": sum(state.shape.numel() for state in states),
        "otherParameters": sum(
            p.numel() for p in parameters if not p.requires_grad and not isinstance(p, bitsandbytes.nn.Params4bit)
        ),
        "quantization": {
            "layers": len(states),
            "type": sorted({state.quant_type for state in states}),
            "doubleQuant": sorted({bool(state.nested) for state in states}),
            "blockSize": sorted({state.blocksize for state in states}),
            "computeDtype": sorted({_name(layer.compute_dtype) for layer in layers}),
            "bytes": sum(layer.weight.nbytes for layer in layers),
        },
        "dtypes": {
            "adapter": sorted({_name(p.dtype) for p in parameters if p.requires_grad}),
            "other": sorted(
                {
                    _name(p.dtype)
                    for p in parameters
                    if not p.requires_grad and not isinstance(p, bitsandbytes.nn.Params4bit)
                }
            ),
        },
    }


def _classes_with_weights(model: Any) -> dict[str, int]:
    """How many modules of each class hold weights of their own."""
    classes = (
        type(module).__name__ for module in model.modules() if any(True for _ in module.parameters(recurse=False))
    )
    return dict(sorted(Counter(classes).items()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
