"""What a library does otherwise than one would think, put right before models are built."""

from __future__ import annotations

import torch


def let_falcon_be_quantized() -> None:
    """Build Falcon from plain linear layers.

    transformers (5.17) lets bitsandbytes replace `torch.nn.Linear` itself and no class derived from it. Falcon's is
    derived, for a product that rounds a little differently, so the whole model would silently stay in 16 bit.
    """
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FalconLinear = torch.nn.Linear
