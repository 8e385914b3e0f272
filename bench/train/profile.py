"""One training step by component, from the times of its kernels."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

COMPONENTS = (
    ("dequantization", r"_dequantize|kDequantize|dequant"),
    ("attention", r"flash|fmha|cudnn.*(sdpa|attention)|cunn_SoftMax|attention"),
    ("optimizer", r"kOptimizer|multi_tensor_apply.*Adam|Adam"),
    ("loss", r"_cross_entropy|CrossEntropy|cross_entropy|nll_loss|log_softmax"),
    (
        "low rank, norm, activation",
        r"_forward|_backward|_rotate|_drop|_add_product|_fg_kernel|_rms|_rope|swiglu|triton",
    ),
    ("matrix products", r"gemm|nvjet|cutlass|Kernel2|splitKreduce|sm90_xmma|sm80_xmma"),
    ("copies", r"Memcpy|Memset"),
)


def components(trainer: Any, steps: int = 2) -> dict[str, Any]:
    """Milliseconds a step by component, idle included, and the ten longest kernels."""
    batches = list(trainer.get_train_dataloader())[:1]

    def step() -> None:
        trainer.training_step(trainer.model, dict(batches[0]), None)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        start.record()
        for _ in range(steps):
            step()
        end.record()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    for event in recorded.events():
        spent = event.self_device_time_total / 1000 / steps
        if spent:
            kernels[event.name[:90]] += spent
            if not event.name.startswith("Memcpy"):
                times[_component(event.name)] += spent
    total = start.elapsed_time(end) / steps
    times["idle"] = max(0.0, total - sum(times.values()))
    return {
        "step_ms": round(total, 2),
        "components_ms": {name: round(spent, 2) for name, spent in sorted(times.items(), key=lambda item: -item[1])},
        "kernels_ms": {
            name: round(spent, 2) for name, spent in sorted(kernels.items(), key=lambda item: -item[1])[:25]
        },
    }


def _component(kernel: str) -> str:
    return next((name for name, pattern in COMPONENTS if re.search(pattern, kernel)), "elementwise and other")
