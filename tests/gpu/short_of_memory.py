"""The trainer on a GPU that grows smaller: `short_of_memory.py STEP` is `python -m qlora_trainer STEP`, with a limit.

After step QLORA_TEST_AFTER (0: from the start) torch may take QLORA_TEST_BYTES of the GPU's memory and no more. What it
raises then is its own out-of-memory error. On a CPU, which has no such limit, micro batches of more than
QLORA_TEST_ROWS rows raise it: for trying the test's own code.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from qlora_trainer import callbacks
from qlora_trainer.__main__ import main

AFTER = int(os.environ["QLORA_TEST_AFTER"])


def limit() -> None:
    """From here on there is less memory."""
    if not torch.cuda.is_available():
        _refuse_large_batches(int(os.environ["QLORA_TEST_ROWS"]))
        return
    room = int(os.environ["QLORA_TEST_BYTES"])
    torch.cuda.empty_cache()  # what is kept for later would be used without asking
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        torch.empty(room + 2**28, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return
    raise RuntimeError("torch allocates more than the fraction that was set: this tests nothing")


def _refuse_large_batches(rows: int) -> None:
    from qlora_trainer.training import Trainer

    plain = Trainer.training_step

    def step(self: Any, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        if len(inputs["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory (injected).")
        return plain(self, model, inputs, *args)

    Trainer.training_step = step  # type: ignore[method-assign]


class Shrinking(callbacks.ProgressCallback):
    """Sets the limit at the end of a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        super().on_step_end(args, state, control, **options)
        if state.global_step == AFTER:
            limit()


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # the trainer's own, before CUDA starts
    if AFTER:
        callbacks.ProgressCallback = Shrinking  # type: ignore[misc]
    else:
        limit()
    sys.exit(main(sys.argv[1:]))
