"""What the model is worth: its loss on held-out rows, and its answers to the manifest's prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import GenerationConfig

from qlora_trainer.batches import model_inputs
from qlora_trainer.formats import IGNORED


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """Evaluation mode that leaves no trace: a run that evaluates more often must not train differently.

    Making a data loader's iterator alone draws from torch's generator, and so would change the next dropout mask.
    """
    training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        model.train(training)


def mean_loss(model: Any, batches: Any, *, fused_head: bool = False) -> float:
    """Mean loss of a token, over all tokens that count. A mean of batch means would weigh short batches too much.

    TRL's fused head never holds the logits of a whole batch, which would be the peak of all memory.
    """
    total, tokens = 0.0, 0
    with measuring(model):
        for batch in batches:
            inputs = {key: value.to(model.device) for key, value in model_inputs(batch).items()}
            loss, count = (_fused_loss if fused_head else _own_loss)(model, inputs)
            total, tokens = total + loss, tokens + count
    return total / max(1, tokens)


def answers(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """The model's greedy answer to each prompt of token ids. Greedy, so that base and tuned model can be compared."""
    if not prompts:
        return []
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=_end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    length = max(len(prompt) for prompt in prompts)
    padding = [length - len(prompt) for prompt in prompts]
    ids = [[tokenizer.pad_token_id] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    with measuring(model):
        # All at once, with the padding on the left: every token costs a pass over all weights, however many answers.
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
        )
    return tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)  # type: ignore[no-any-return]


def _fused_loss(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Summed loss of a batch, and how many tokens it is of."""
    output = model(**inputs, fused_lm_head=True)
    return -float(output.log_probs.double().sum()), int(output.label_mask.sum())


def _own_loss(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, int]:
    """The same from the model's logits."""
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return float(loss), int((labels != IGNORED).sum())


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a text: the model's own, and the one the training rows ended with."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (*own, tokenizer.eos_token_id) if token is not None})
