"""Facts of a model from its config.json: counts by kind, to the parameter, without torch or transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_vram.architectures import FAMILIES, Family, Linear, Norm
from qlora_vram.architectures.layout import Condition
from qlora_vram.coverage import longest_regular
from qlorajob.plan import LinearLayers, ModelFacts

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""Numbers that every model has, and that nothing else follows into."""


class InvalidConfigError(ValueError):
    """A config.json of a known model type that no model can be built from. The message names the key."""


def model_facts(config: Mapping[str, Any], *, weight_bytes: int = 0) -> ModelFacts | None:
    """Facts of the model that a parsed config.json describes; None where its architecture isn't known here.

    The counts are those of the module tree that transformers builds (5.17), not of the file: a head that shares the
    embeddings counts once, even where it was saved twice. Raises InvalidConfigError.
    """
    found = blueprint(config)
    return found.facts(weight_bytes) if found else None


def blueprint(config: Mapping[str, Any]) -> Blueprint | None:
    """How the model of a parsed config.json is built; None if not known here. Raises InvalidConfigError."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or "per_layer_config" in config:  # layers that differ, one by one
        return None
    if any(config.get(key) is None for key in family.needs) or any(config.get(key) for key in family.refuses):
        return None
    return Blueprint(str(config["model_type"]), family, _values(family, config), longest_regular(config))


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A family with the numbers of one model: which modules it has, and how large they are."""

    model_type: str
    family: Family
    values: Mapping[str, Any]
    regular_length: int | None = None
    """As in ModelFacts."""

    @property
    def tied(self) -> bool:
        """The head shares the token embeddings' weights."""
        return bool(self.values["tie_word_embeddings"])

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Every linear layer but the head, with its module path, in transformers' order."""
        for linear in self.family.outer_linears:
            if self._holds(linear.when):
                yield linear.path, linear
        for layer in range(self.values["num_hidden_layers"]):
            for linear in self._layer(layer):
                yield f"{self.family.layers}.{layer}.{linear.path}", linear

    def linear_paths(self) -> tuple[str, ...]:
        """Module paths of all linear layers, the head's last."""
        return *(path for path, _ in self.linears()), self.family.head

    def head_path(self) -> str:
        """Module path of the output head."""
        return self.family.head

    def facts(self, weight_bytes: int = 0) -> ModelFacts:
        """Counts by kind. `weight_bytes` is the size of the files, which no config tells."""
        values, family = self.values, self.family
        vocabulary, layers = values["vocab_size"], values["num_hidden_layers"]
        sparse = [layer for layer in range(layers) if self._has_experts(layer)]
        linears, biases, loose = self._count_linears()
        tokens = vocabulary * self._width(family.embedding)
        positions = values[family.positions] * values["hidden"] if family.positions else 0
        head = 0 if self.tied else tokens
        experts, routers = self._count_experts()
        norms = layers * self._count_norms(family.norms) + self._count_norms(family.outer_norms)
        other = biases + loose + norms + len(sparse) * routers + (vocabulary if self._holds(family.head_bias) else 0)
        return ModelFacts(
            model_type=self.model_type,
            parameters=sum(each.parameters for each in linears)
            + tokens
            + positions
            + head
            + len(sparse) * experts
            + other,
            linears=linears,
            embedding_parameters=tokens + positions,
            head_parameters=head,
            expert_parameters=len(sparse) * experts,
            other_parameters=other,
            layers=layers,
            hidden_size=values["hidden"],
            intermediate_size=max((self._inside(layer in sparse) for layer in range(layers)), default=0),
            attention_heads=values["num_attention_heads"],
            key_value_heads=values["num_key_value_heads"],
            head_size=values["head"],
            vocabulary=vocabulary,
            regular_length=self.regular_length,
            whole_logits=family.whole_logits,
            weight_bytes=weight_bytes,
        )

    def _layer(self, layer: int) -> Iterator[Linear]:
        family = self.family
        feed_forward = family.feed_forward
        if family.experts and self._has_experts(layer):
            feed_forward = family.experts.shared
        return (linear for linear in (*family.attention, *feed_forward) if self._holds(linear.when))

    def _has_experts(self, layer: int) -> bool:
        experts, values = self.family.experts, self.values
        if experts is None or not values["num_experts"]:
            return False
        first = values[experts.dense_first] if experts.dense_first else 0
        step = (values[experts.step] if experts.step else 1) or 1
        dense = values.get(experts.dense) or ()
        return layer >= first and (layer + 1) % step == 0 and layer not in dense

    def _count_linears(self) -> tuple[tuple[LinearLayers, ...], int, int]:
        """Linear layers by name and shape, their biases, and the weights of one that isn't quantized."""
        counts: Counter[tuple[str, int, int]] = Counter()
        biases = 0
        for _, linear in self.linears():
            shape = linear.name, self._width(linear.inputs), self._width(linear.outputs)
            counts[shape] += 1
            biased = self._holds(linear.bias)
            biases += biased * shape[2]
        loose = 0
        if self.tied and not biased and not self._count_norms((*self.family.norms, *self.family.outer_norms)):
            # transformers never quantizes the module of the last parameter. That is the head or a norm, but for
            # OLMo, whose norms have no parameters.
            counts[shape] -= 1
            loose = shape[1] * shape[2]
        linears = tuple(
            LinearLayers(name=name, inputs=inputs, outputs=outputs, count=count)
            for (name, inputs, outputs), count in counts.items()
            if count
        )
        return linears, biases, loose

    def _count_experts(self) -> tuple[int, int]:
        """Parameters of one layer's experts, and of its router."""
        experts, hidden = self.family.experts, self.values["hidden"]
        if experts is None:
            return 0, 0
        count, width, bias = self.values["num_experts"], self._width(experts.width), self._holds(experts.bias)
        each = 3 * hidden * width + (2 * width + hidden if bias else 0)
        return count * each, count * (hidden + bias)

    def _count_norms(self, norms: tuple[Norm, ...]) -> int:
        return sum(self._width(norm.width) * (1 + self._holds(norm.bias)) for norm in norms if self._holds(norm.when))

    def _inside(self, sparse: bool) -> int:
        """Width that one token sees inside a layer's feed-forward part."""
        experts = self.family.experts
        if experts is None or not sparse:
            return self._width("ffn")
        shared = self._width(experts.shared_width) if experts.shared_width else 0
        return (self.values["num_experts_per_tok"] or 0) * self._width(experts.width) + shared

    def _width(self, names: str) -> int:
        return sum(self.values[name] for name in names.split("+"))

    def _holds(self, condition: Condition) -> bool:
        if isinstance(condition, bool):
            return condition
        return bool(self.values.get(condition.removeprefix("!"))) is not condition.startswith("!")


def _values(family: Family, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config under usual names, with what it leaves out and what follows from it."""
    values = {**family.defaults, **config}
    values |= {usual: config[own] for usual, own in family.aliases.items() if own in config}
    for key, default in family.defaults.items():
        _check(key, values[key], default)
    completed = dict(family.complete(values)) if family.complete else {}
    values |= completed
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    head = values.get("head_dim") or hidden // heads
    kv_heads = values["num_key_value_heads"] or heads
    derived = {
        "one": 1,
        "hidden": hidden,
        "head": head,
        "queries": heads * head,
        "keys": kv_heads * head,
        "ffn": values["intermediate_size"] or 4 * hidden,
        "num_key_value_heads": kv_heads,
    }
    return values | derived | completed


def _check(key: str, value: Any, default: Any) -> None:
    if isinstance(default, bool) or (value is None and key not in SIZES):
        return
    least = 1 if key in SIZES else 0
    if type(value) is not int or value < least:
        raise InvalidConfigError(f"config.json: {key} must be a whole number of at least {least}, not {value!r}")
