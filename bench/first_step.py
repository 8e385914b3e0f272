"""What a first small step of an adapter does to the loss, in float32 and in bfloat16: `python -m bench.first_step`.

On a CPU, with real weights (SmolLM2-135M): the adapter's B matrices go against their gradient's sign by each size.
In bfloat16 by the fast path as it is, which adds an adapter's update before it rounds a layer's output; and as it is
usually done, added to the output that was rounded already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import weights
from bench.curves.text import rows
from bench.jobs import plan_of, spec_of
from qlora_trainer.fast.attention import Layout
from qlora_trainer.fast.decoder import FastDecoder
from qlora_trainer.fast.linears import Group

SIZES = (2e-5, 6.7e-5, 2e-4, 1e-3)
TOKENS = 256
Product = Callable[..., torch.Tensor]


def main() -> None:
    """Print a table."""
    folder = Path(weights.ensure())
    ids = torch.as_tensor(rows(1, TOKENS, folder)[0]["input_ids"]).long()[None]
    exact, rounded = (_decoder(folder, dtype) for dtype in (torch.float32, torch.bfloat16))
    first, last = _loss, partial(_with, partial(_added_last, Group.product))
    start = _loss(exact, ids)
    start.backward()  # type: ignore[no-untyped-call]
    directions = [None if each.grad is None else each.grad.sign() for each in exact.parameters]
    before = [start.item(), last(rounded, ids).item(), first(rounded, ids).item()]
    print(
        "| size of the step | float32 | bfloat16, update added last | bfloat16, update added first |\n|---|---|---|---|"
    )
    for size in SIZES:
        for decoder in (exact, rounded):
            _step(decoder, directions, size)
        after = [_loss(exact, ids).item(), last(rounded, ids).item(), first(rounded, ids).item()]
        print(
            f"| {size:g} | " + " | ".join(f"{b - a:.4f}" for b, a in zip(before, after, strict=True)) + " |", flush=True
        )


def _decoder(folder: Path, dtype: torch.dtype) -> FastDecoder:
    """The fast path in its plain pieces, over the model with an adapter that changes nothing yet."""
    torch.manual_seed(0)  # of the adapter's first matrices
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    uris = {"model": "hf://bench/random", "dataset": "hf://bench/random", "output": "s3://bench/random"}
    spec = spec_of({field: {"uri": uri} for field, uri in uris.items()})
    return FastDecoder(get_peft_model(model, config).train(), plan_of(spec, rows=1, gpus=0))


def _step(decoder: FastDecoder, directions: list[torch.Tensor | None], size: float) -> None:
    """Every A has a gradient of zero, since B is zero where it is taken."""
    for parameter, direction in zip(decoder.parameters, directions, strict=True):
        if direction is not None and bool(direction.any()):
            parameter.data.copy_(-size * direction)


def _loss(decoder: FastDecoder, ids: torch.Tensor) -> torch.Tensor:
    return decoder.summed_loss(ids, ids, torch.arange(TOKENS)[None], Layout(1)) / TOKENS


def _with(product: Product, decoder: FastDecoder, ids: torch.Tensor) -> torch.Tensor:
    with patch.object(Group, "product", lambda *arguments: product(*arguments)):
        return _loss(decoder, ids)


def _added_last(product: Product, group: Group, x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    y = product(group, x[:, : group.inputs], buffer)
    return y.addmm_(x[:, group.inputs :], group.b.T, alpha=group.scale) if x.shape[1] > group.inputs else y


if __name__ == "__main__":
    main()
