"""A training run as far as its memory and speed go: the model, the adapter, and how the work is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from qlora_vram.architectures import FAMILIES
from qlora_vram.coverage import FAST_FAMILIES
from qlora_vram.gpus import GpuClass
from qlora_vram.layers import Layer, detailed
from qlorajob.plan import LinearLayers, ModelFacts
from qlorajob.precision import NumberTypes, number_types
from qlorajob.spec import Backend, QLoRAJobSpec

Engine = Literal["plain", "fast"]
"""The trainer's two ways through a decoder layer: transformers' and PEFT's modules, or `qlora_trainer.fast`."""
Strategy = Literal["single", "ddp", "fsdp"]

LENGTH_MULTIPLE: Final = 64
"""On a GPU rows are filled up to a multiple of this: what its matrix units work in, and few different shapes. The
trainer takes the number from here."""
FAST_CAPABILITY: Final = 8.0
"""The attention kernels of `qlora_trainer.fast` need this compute capability."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a run is cut: what a planner may choose."""

    rows: int
    """Micro batch: rows that go through one GPU at once."""
    checkpointed_layers: int
    """Layers, from the first, that compute their forward pass again."""
    offload: bool = False
    """Their inputs wait in host memory."""
    gpus: int = 1
    strategy: Strategy = "single"
    cached: bool = False
    """The quantized weights are there in 16 bit too: only the fast engine's."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Everything that the peak and the speed of a run follow from."""

    facts: ModelFacts
    shape: Shape
    length: int
    """Tokens of a row."""
    rank: int = 16
    targets: tuple[LinearLayers, ...] = ()
    """Layers with an adapter."""
    dropout: bool = True
    """The adapter drops some of its inputs, and so keeps copies of them."""
    double_quantization: bool = True
    optimizer: str = "paged_adamw_8bit"
    packing: bool = True
    accumulation: int = 1
    """Micro batches that make one step."""
    engine: Engine = "plain"
    backend: Backend = "hf"
    compute_bytes: int = 2
    """Bytes of a number in the frozen model's products."""
    autocast: bool = True
    """Mixed precision: the float32 adapter computes in 16 bit."""
    recast: bool = False
    """Autocast rounds what the frozen model's products read, weights included, to another type than theirs."""
    scaled: bool = False
    """fp16: gradients are scaled, by what no CUDA graph could know."""
    changing: bool = False
    """Micro batches are of different lengths."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch, as the trainer fills rows up."""
        return self.shape.rows * -(-self.length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE

    @property
    def layer(self) -> Layer:
        """A decoder layer of the model."""
        return Layer.of(self.facts)

    @property
    def kept_layers(self) -> int:
        """Layers that keep what their backward pass needs."""
        return max(0, self.facts.layers - self.shape.checkpointed_layers)

    @property
    def adapter_parameters(self) -> int:
        """Trained parameters: A [rank, inputs] and B [outputs, rank] of each target."""
        return sum(self.rank * (target.inputs + target.outputs) * target.count for target in self.targets)


def workload(spec: QLoRAJobSpec, facts: ModelFacts, gpu: GpuClass, shape: Shape, accumulation: int) -> Workload:
    """The run that `spec` asks for on `gpu`, cut as `shape` says."""
    facts = detailed(facts)
    training, types = spec.training, types_on(gpu, spec)
    return Workload(
        facts=facts,
        shape=shape,
        length=training.max_sequence_length,
        rank=spec.lora.rank,
        targets=adapted(spec, facts),
        dropout=spec.lora.dropout > 0,
        double_quantization=spec.quantization.double_quant,
        optimizer=training.optimizer,
        packing=training.packing,
        accumulation=accumulation,
        engine=engine(spec, facts, gpu, shape),
        backend=training.backend,
        compute_bytes=4 if types.compute == "float32" else 2,
        autocast=types.precision != "fp32",
        recast=types.differ,
        scaled=types.precision == "fp16",
        changing=not training.packing,
    )


def types_on(gpu: GpuClass, spec: QLoRAJobSpec) -> NumberTypes:
    """What the trainer computes in there."""
    return number_types(spec, "bfloat16" if gpu.bf16 else "float16")


def engine(spec: QLoRAJobSpec, facts: ModelFacts, gpu: GpuClass, shape: Shape) -> Engine:
    """Which way through a layer the trainer takes. Unsloth's is its own, and takes no more than the plain one."""
    regular = facts.regular_length is None or spec.training.max_sequence_length <= facts.regular_length
    covered = facts.model_type in FAST_FAMILIES and regular and spec.lora.bias == "none"
    covered = covered and spec.training.backend == "hf" and types_on(gpu, spec).narrow
    return "fast" if covered and gpu.compute_capability >= FAST_CAPABILITY and shape.gpus == 1 else "plain"


def adapted(spec: QLoRAJobSpec, facts: ModelFacts) -> tuple[LinearLayers, ...]:
    """The layers that get an adapter. All of them where PEFT's choice for the family isn't known: never too few."""
    wanted = spec.lora.target_modules
    if wanted == "default":
        family = FAMILIES.get(facts.model_type)
        wanted = family.lora_default if family and family.lora_default else "all-linear"
    if isinstance(wanted, str):
        return facts.linears
    names = {name.rpartition(".")[2] for name in wanted}
    return tuple(linear for linear in facts.linears if linear.name in names)
