"""What a first small step of an adapter does to the loss: `python -m bench.first_step [MODEL]`.

The adapter's B matrices go against their gradient's sign by each size. How far does the loss fall in the reference
recipe, on the fast path, and there with the update added to the rounded product, as is usual? And how far would it if
nothing were rounded but the frozen weights? MODEL is a shape of bench.models or a folder with real weights (default:
SmolLM2-135M's). On a GPU where there is one; on a CPU, products that are added to are not rounded first, as they are
on a GPU by cuBLAS.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.nn import functional

import weights
from bench.curves.worker import Run, compute_in, plain_base
from bench.jobs import plan_of
from qlora_trainer.fast.attention import Layout
from qlora_trainer.fast.decoder import FastDecoder
from qlora_trainer.fast.linears import Group

SIZES = (2e-5, 6.7e-5, 2.7e-4, 1e-3)
Loss = Callable[[torch.Tensor], torch.Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Print a table: by how much the loss falls, mean of the batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--rows", type=int, default=4 if DEVICE == "cuda" else 1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    run = Run(options.model or str(weights.ensure()), options.batches, options.rows, options.length, learning_rate=1e-4)
    made = run.data()
    ids = torch.stack([torch.as_tensor(row["input_ids"]).long() for row in made]).to(DEVICE).chunk(run.steps)
    bases = [plain_base(run, torch.bfloat16) for _ in range(2)]
    plain, fast = _adapted(prepare_model_for_kbit_training(bases[0])), _adapted(bases[1])
    columns = _columns(plain, FastDecoder(fast, plan_of(run.spec(), rows=run.rows, gpus=int(DEVICE == "cuda"))))
    columns["fast path"](ids[0]).backward()  # type: ignore[no-untyped-call]
    directions = {name: p.grad.sign() for name, p in fast.named_parameters() if p.grad is not None}
    before = {name: _mean(loss, ids) for name, loss in columns.items()}
    print("| size of the step | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for size in SIZES:
        for model in (plain, fast):
            _step(model, directions, size)
        falls = [f"{before[name] - _mean(loss, ids):.4f}" for name, loss in columns.items()]
        print(f"| {size:g} | " + " | ".join(falls) + " |", flush=True)


def _adapted(base: Any) -> Any:
    """With an adapter that changes nothing yet."""
    torch.manual_seed(0)  # of the adapter's first matrices
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def _columns(plain: Any, decoder: FastDecoder) -> dict[str, Loss]:
    return {
        "float32": partial(_plain_loss, plain, exact=True),
        "reference recipe": partial(_plain_loss, plain),
        "fast path, update added last": partial(_with, partial(_added_last, Group.product), decoder),
        "fast path": partial(_fast_loss, decoder),
    }


def _step(model: Any, directions: dict[str, torch.Tensor], size: float) -> None:
    """Every A has a gradient of zero, since B is zero where it is taken."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(-size * directions[name])


def _mean(loss: Loss, batches: Any) -> float:
    with torch.no_grad():
        return sum(loss(ids).item() for ids in batches) / len(batches)


def _plain_loss(model: Any, ids: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
    compute_in(torch.float32 if exact else torch.bfloat16, model)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=not exact):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def _fast_loss(decoder: FastDecoder, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return decoder.summed_loss(ids, ids, positions, Layout(len(ids))) / (len(ids) * (ids.shape[1] - 1))


def _with(product: Callable[..., torch.Tensor], decoder: FastDecoder, ids: torch.Tensor) -> torch.Tensor:
    with patch.object(Group, "product", lambda *arguments: product(*arguments)):
        return _fast_loss(decoder, ids)


def _added_last(
    product: Callable[..., torch.Tensor], group: Group, x: torch.Tensor, buffer: torch.Tensor
) -> torch.Tensor:
    y = product(group, x[:, : group.inputs], buffer)
    return y.addmm_(x[:, group.inputs :], group.b.T, alpha=group.scale) if x.shape[1] > group.inputs else y


if __name__ == "__main__":
    main()
