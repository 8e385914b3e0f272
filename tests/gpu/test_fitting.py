"""A GPU on which others have taken most of the memory."""

from __future__ import annotations

import torch

from qlora_trainer.fitting import fitted, memory_left
from qlora_trainer.hardware import Hardware
from qlora_vram.gpus import GIB
from qlora_vram.planner import plan
from qlorajob.plan import Plan
from tests.support import models
from tests.unit.vram.workloads import spec


def test_the_plan_is_held_against_what_is_really_left() -> None:
    facts, job = models.facts("Llama-2-7B"), spec(resources={"gpuClass": "H100"}, training={"maxSequenceLength": 2048})
    planned = plan(job, facts)
    assert isinstance(planned, Plan)
    torch.cuda.empty_cache()
    hardware = Hardware.choose(job, planned)
    assert fitted(planned, job, facts, hardware) is planned
    others = torch.empty(memory_left() - 20 * GIB, dtype=torch.uint8, device="cuda")
    found = fitted(planned, job, facts, hardware)
    del others
    torch.cuda.empty_cache()
    assert found.micro_batch_size < planned.micro_batch_size
    assert found.predicted_peak_bytes <= 20.1 * GIB
    assert "this GPU has 21.5 GB left" in hardware.degradations[-1]
