"""bitsandbytes' optimizers without their waits."""

from __future__ import annotations

from bitsandbytes.optim import optimizer


def let_optimizers_run_ahead() -> None:
    """Stop bitsandbytes from waiting for the GPU after each parameter's update: 448 times a step for an adapter of 7B.

    All updates are launched on the stream that computes the gradients and reads the weights, so they are in order
    without it. Reading a state, for a checkpoint say, waits by itself.
    """
    optimizer.sync_gpu = lambda *_: None
