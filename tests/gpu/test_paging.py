"""Optimizer states on a GPU after a resume: the same values, and paged again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import optim

from qlora_trainer.paging import restore_pages

LARGE, SMALL = (512, 1024), (64, 64)
"""bitsandbytes pages states of 100,000 numbers or more."""


class Training:
    """Two parameters whose gradients follow from the step."""

    def __init__(self, kind: Any) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        self.parameters = [
            torch.nn.Parameter(torch.randn(shape, device="cuda", generator=generator)) for shape in (LARGE, SMALL)
        ]
        self.optimizer = kind(self.parameters, lr=1e-2)

    def steps(self, *numbers: int) -> None:
        for number in numbers:
            generator = torch.Generator("cuda").manual_seed(number)
            for parameter in self.parameters:
                parameter.grad = torch.randn(parameter.shape, device="cuda", generator=generator)
            self.optimizer.step()

    def save(self, path: Path) -> None:
        torch.save({"parameters": [p.data for p in self.parameters], "optimizer": self.optimizer.state_dict()}, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for parameter, value in zip(self.parameters, saved["parameters"], strict=True):
            parameter.data.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])

    def paged(self) -> list[bool]:
        return [getattr(self.optimizer.state[p]["state1"], "is_paged", False) for p in self.parameters]


@pytest.mark.parametrize("kind", [optim.PagedAdamW8bit, optim.PagedAdamW32bit, optim.AdamW8bit])
def test_a_resumed_optimizer_goes_on_to_the_bit_and_pages_what_it_paged(kind: Any, tmp_path: Path) -> None:
    whole = Training(kind)
    whole.steps(1, 2, 3)
    whole.save(tmp_path / "checkpoint")
    resumed = Training(kind)
    resumed.load(tmp_path / "checkpoint")
    moved = restore_pages(resumed.optimizer)
    whole.steps(4, 5, 6)
    resumed.steps(4, 5, 6)

    assert resumed.paged() == whole.paged()
    assert (moved > 0) == whole.paged()[0]
    for parameter, other in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(parameter, other)
