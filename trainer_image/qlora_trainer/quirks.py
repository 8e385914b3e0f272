"""What a library or a model's own code does otherwise than one would think, put right."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch


def let_falcon_be_quantized() -> None:
    """Build Falcon from plain linear layers.

    transformers (5.17) lets bitsandbytes replace `torch.nn.Linear` itself and no class derived from it. Falcon's is
    derived, for a product that rounds a little differently, so the whole model would silently stay in 16 bit.
    """
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FalconLinear = torch.nn.Linear


def tell_output_head(model: Any) -> None:
    """Let a model say which of its layers is the output head, where its own code doesn't (ChatGLM2's, for one).

    Otherwise PEFT's `all-linear` would adapt the head too. It is the linear layer that has an output for each token
    there is.
    """
    if model.get_output_embeddings() is not None:
        return
    tokens = model.get_input_embeddings().num_embeddings
    heads = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == tokens
    ]
    if heads:
        path = heads[-1]
        model.get_output_embeddings = MethodType(lambda self: self.get_submodule(path), model)
