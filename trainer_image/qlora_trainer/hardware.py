"""Which device and number types this run uses, and in which ways that is less than the manifest asked for."""

from __future__ import annotations

import logging
import os
import resource
import sys
import threading
from dataclasses import dataclass, field
from typing import Literal

import torch

from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.plan import Plan
from qlorajob.precision import ComputeType, NumberTypes, Precision, number_types
from qlorajob.spec import QLoRAJobSpec

logger = logging.getLogger(__name__)

ENV_DEVICE = "QLORA_DEVICE"
"""`cpu` trains on the CPU although the plan has a GPU: for test clusters whose GPUs are only labels."""

DTYPES: dict[ComputeType, torch.dtype] = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
}  # fmt: skip
BITSANDBYTES_OPTIMIZERS = frozenset({"paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit"})


@dataclass(frozen=True, slots=True)
class Hardware:
    """Decisions that depend on the machine. `degradations` say, for the report, where the manifest asked for more."""

    device: Literal["cuda", "cpu"]
    types: NumberTypes
    optimizer: str
    degradations: list[str] = field(default_factory=list)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the frozen model's products, and of what isn't in 4 bit."""
        return DTYPES[self.types.compute]

    @property
    def precision(self) -> Precision:
        """Mixed precision's."""
        return self.types.precision

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on a GPU."""
        return self.device == "cuda"

    @classmethod
    def choose(cls, spec: QLoRAJobSpec, plan: Plan) -> Hardware:
        """Decide for this machine; log each degradation."""
        degradations: list[str] = []
        device = _device(plan, degradations)
        bf16 = device == "cuda" and plan.bf16 and torch.cuda.get_device_capability()[0] >= 8
        best: ComputeType = "bfloat16" if bf16 else "float16" if device == "cuda" else "float32"
        types = number_types(spec, best)
        degradations += types.degradations
        hardware = cls(device, types, _optimizer(spec, device, degradations), degradations)
        for reason in degradations:
            logger.warning(reason)
        return hardware

    def degrade(self, reason: str | None) -> None:
        """Note, and log, one more way in which this run does less than it was asked to; None is none."""
        if reason is not None:
            self.degradations.append(reason)
            logger.warning(reason)


def wake_gpu(plan: Plan) -> threading.Thread:
    """Start CUDA, which takes a second, beside whatever is done meanwhile. Whoever uses it next waits for the rest."""
    thread = threading.Thread(target=_start_cuda, args=(plan,), name="wake-gpu", daemon=True)
    thread.start()
    return thread


def _start_cuda(plan: Plan) -> None:
    try:
        if plan.gpus and _cuda_is_available():
            torch.zeros(1, device="cuda")
    except RuntimeError as error:  # which the trainer's first use of the GPU meets as well, and then tells
        logger.info("the GPU doesn't start yet: %s", error)


def _cuda_is_available() -> bool:
    # Memory that grows in place instead of in blocks of a size: less of it lies idle. Read when CUDA starts.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return torch.cuda.is_available()


def _device(plan: Plan, degradations: list[str]) -> Literal["cuda", "cpu"]:
    if plan.gpus == 0:
        return "cpu"
    if _cuda_is_available():
        return "cuda"
    if os.environ.get(ENV_DEVICE) == "cpu":
        degradations.append(f"the plan's GPU ({plan.gpu_class}) isn't used: {ENV_DEVICE} says cpu")
        return "cpu"
    message = (
        f"the plan needs a GPU ({plan.gpu_class}), but CUDA finds none in this pod; check the node's driver and device "
        f"plugin (on a test cluster without real GPUs, set {ENV_DEVICE}=cpu)"
    )
    raise StepError(Reason.UNSCHEDULABLE, message, field="resources.gpuClass", code=ExitCode.TRANSIENT)


def _optimizer(spec: QLoRAJobSpec, device: str, degradations: list[str]) -> str:
    asked = spec.training.optimizer
    if device == "cpu" and asked in BITSANDBYTES_OPTIMIZERS:
        degradations.append(f"training.optimizer {asked} runs as adamw_torch: its paging and 8-bit states need a GPU")
        return "adamw_torch"
    return asked


def peak_memory(hardware: Hardware) -> int:
    """Peak memory so far, in bytes: of the GPU as the driver counts it, of this process on CPU."""
    if not hardware.on_gpu:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    free, total = torch.cuda.mem_get_info()
    beside_torch = total - free - torch.cuda.memory_reserved()  # CUDA context, libraries, paged optimizer states
    return torch.cuda.max_memory_reserved() + max(0, beside_torch)
