"""A model without memory for its weights: every module and shape, as torch and transformers build them.

Takes the seconds of importing torch. `qlora_vram` has the same facts from config.json for the families it knows, and
is held to this module by a test; `prepare` comes here for all others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D  # GPT-2's
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_trainer.quirks import let_falcon_be_quantized, tell_output_head
from qlora_trainer.remote_code import ready_models
from qlora_vram.coverage import FAST_FAMILIES, longest_regular, of_transformers
from qlorajob.plan import LinearLayers, ModelFacts
from qlorajob.spec import LoraSpec

FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "wqkv", "W_pack")
"""Names of a projection that makes queries, keys and values together."""
LAYER = re.compile(r".*?\.\d+(?=\.)")
"""The path of a decoder layer, such as model.layers.3."""


class MetaModel:
    """A causal language model on torch's meta device."""

    def __init__(self, config: Any, *, trust_remote_code: bool = False) -> None:
        """Build it from transformers' config. Raises what transformers raises for a model that is no such model."""
        let_falcon_be_quantized()
        ready_models()
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        tell_output_head(self._model)
        self._config = config
        self._text = config.get_text_config()

    def linear_paths(self) -> tuple[str, ...]:
        """Module paths of the linear layers, the output head's included."""
        return tuple(
            name for name, module in self._model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)
        )

    def head_path(self) -> str:
        """Module path of the output head."""
        head = self._model.get_output_embeddings()
        return next((name for name, module in self._model.named_modules() if module is head), "")

    def adapts_experts(self, spec: LoraSpec) -> bool:
        """Whether an adapter changes experts whose weights are stacked. Raises StepError where PEFT makes none."""
        from peft.tuners.lora.layer import ParamWrapper

        from qlora_trainer.model import add_adapter

        return any(isinstance(module, ParamWrapper) for module in add_adapter(self._model, spec).modules())

    def facts(self, weight_bytes: int = 0) -> ModelFacts:
        """Counts by kind, read from the modules; so are widths that have no usual name in configs."""
        linears, kinds = self._linears(), self._count_kinds()
        heads, hidden = self._number("num_attention_heads"), self._number("hidden_size")
        head_size = self._number("qk_head_dim", "head_dim") or (hidden // heads if heads else 0)
        head = self._model.get_output_embeddings()
        return ModelFacts(
            model_type=self._config.model_type,
            parameters=sum(kinds.values()),
            linears=linears,
            embedding_parameters=kinds["embedding"],
            head_parameters=kinds["head"],
            expert_parameters=kinds["expert"],
            other_parameters=kinds["other"],
            layers=self._number("num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=self._intermediate_size(),
            attention_heads=heads,
            key_value_heads=_key_value_heads(linears, heads, head_size) or self._number("num_key_value_heads") or heads,
            head_size=head_size,
            vocabulary=head.weight.shape[0] if head is not None else self._number("vocab_size"),
            regular_length=self._regular_length(),
            weight_bytes=weight_bytes,
        )

    def _regular_length(self) -> int | None:
        kind = self._config.model_type
        replaced = kind in FAST_FAMILIES and not of_transformers(kind, type(self._model))
        return 0 if replaced else longest_regular(self._text.to_dict())

    def _number(self, *names: str) -> int:
        """The first of these that the config has; the largest where it differs between layers; 0 if there is none."""
        for name in names:
            try:
                found = [getattr(self._text, name, None)]
            except RuntimeError:  # transformers won't name one value where each layer has its own
                found = [getattr(layer, name, None) for layer in self._text.per_layer_config]
            numbers = [value for value in found if isinstance(value, int)]
            if numbers:
                return max(numbers)
        return 0

    def _quantized(self) -> Iterator[tuple[str, Any]]:
        """The modules that transformers lets bitsandbytes replace, by transformers' own rule."""
        keep = [*get_keys_to_not_convert(self._model), *(self._model._keep_in_fp32_modules or ())]
        for name, module in self._model.named_modules():
            if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, keep):
                yield name, module

    def _linears(self) -> tuple[LinearLayers, ...]:
        counts = Counter((name.rpartition(".")[2], *_shape(module)) for name, module in self._quantized())
        return tuple(
            LinearLayers(name=name, inputs=inputs, outputs=outputs, count=count)
            for (name, inputs, outputs), count in counts.items()
        )

    def _count_kinds(self) -> Counter[str]:
        """Parameters by kind. Those that several modules share count once, for the first of them."""
        head = self._model.get_output_embeddings()
        quantized = {id(module) for _, module in self._quantized()}
        kinds: Counter[str] = Counter()
        seen: set[int] = set()
        for module in self._model.modules():
            stacked = _is_stacked(module)
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                if stacked:
                    kind = "expert"
                elif name == "weight" and id(module) in quantized:
                    kind = "linear"
                elif isinstance(module, torch.nn.Embedding):
                    kind = "embedding"
                elif name == "weight" and module is head:
                    kind = "head"
                else:
                    kind = "other"
                kinds[kind] += parameter.numel()
        return kinds

    def _intermediate_size(self) -> int:
        """Largest width inside a layer's feed-forward part: what the last linear layer of each of its modules reads."""
        hidden = self._number("hidden_size")
        inside: dict[str, dict[str, int]] = {}
        for name, module in self._model.named_modules():
            layer = LAYER.match(name)
            if layer is None or "attn" in name or "attention" in name:
                continue
            widths = inside.setdefault(layer[0], {})
            if _is_stacked(module):
                widths[name] = self._visited_width(module)
            elif isinstance(module, torch.nn.Linear | Conv1D) and _shape(module)[1] == hidden:
                widths[name.rpartition(".")[0]] = _shape(module)[0]
        return max((sum(widths.values()) for widths in inside.values()), default=0)

    def _visited_width(self, experts: Any) -> int:
        """Width of the stacked experts that one token visits: each has a gate, an up and a down matrix."""
        weights: int = sum(
            weight[0].numel() for _, weight in experts.named_parameters(recurse=False) if weight.dim() == 3
        )
        return self._number("num_experts_per_tok") * weights // (3 * self._number("hidden_size") or 1)


def _shape(module: Any) -> tuple[int, int]:
    """Inputs and outputs."""
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return inputs, outputs
    return module.in_features, module.out_features


def _is_stacked(module: Any) -> bool:
    """Experts as transformers holds them: [experts, out, in]. A convolution's weight has three dimensions too."""
    own = module.named_parameters(recurse=False)
    return not isinstance(module, torch.nn.modules.conv._ConvNd) and any(weight.dim() == 3 for _, weight in own)


def _key_value_heads(linears: tuple[LinearLayers, ...], heads: int, head_size: int) -> int:
    """From the width of the key projection, or of the fused one; 0 where there is neither."""
    outputs = {linear.name: linear.outputs for linear in linears}
    if not head_size:
        return 0
    if "k_proj" in outputs:
        return outputs["k_proj"] // head_size
    fused = next((outputs[name] for name in FUSED if name in outputs), 0)
    return max(0, (fused // head_size - heads) // 2)
