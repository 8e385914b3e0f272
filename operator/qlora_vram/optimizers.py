"""GPU memory of an optimizer: its states, and what it needs to compute."""

from __future__ import annotations

from typing import Final

from qlora_vram.workload import Workload

SMALL_STATES: Final = 4096
"""bitsandbytes holds the optimizer states of smaller tensors in 32 bit (`min_8bit_size`)."""
STATE_BLOCK: Final = 256
"""8-bit states that share a float32 constant."""
GRADIENT: Final = 4
ADAPTER: Final = 4
"""The trainer keeps the adapter, and so its gradients, in float32."""
FOREACH_SHARE: Final = 1.4
"""torch's AdamW takes the roots of all states at once; no block that was free before has their sizes (measured)."""


def optimizer_bytes(workload: Workload) -> int:
    """States of the adapter's parameters. Paged ones are on the GPU as long as there is room, so they count."""
    name = workload.optimizer
    tensors = [(workload.rank, target.inputs, target.count) for target in workload.targets]
    tensors += [(target.outputs, workload.rank, target.count) for target in workload.targets]
    if name == "adafactor":
        return sum(4 * (rows + columns) * count for rows, columns, count in tensors)
    if name == "sgd":
        return 0
    eight_bit = name.endswith("8bit")
    return sum(
        count * (_eight_bit_states(rows * columns) if eight_bit else 8 * rows * columns)
        for rows, columns, count in tensors
    )


def _eight_bit_states(numbers: int) -> int:
    """Two Adam states of one tensor. Never less for a larger one, although 8-bit states begin with a step down."""
    wide = 8 * min(numbers, SMALL_STATES - 1)
    return max(wide, 2 * (numbers + 4 * -(-numbers // STATE_BLOCK)) if numbers >= SMALL_STATES else 0)


def workspace_bytes(workload: Workload) -> int:
    """torch's own optimizers compute on all parameters at once, and Adafactor in a tensor of each one's size."""
    if workload.optimizer == "adamw_torch":
        return int(FOREACH_SHARE * ADAPTER * workload.adapter_parameters)
    if workload.optimizer == "adafactor":
        widest = max((max(target.inputs, target.outputs) for target in workload.targets), default=0)
        return 2 * ADAPTER * workload.rank * widest
    return 0
