"""TRL's fused head, which computes the loss of many tokens without ever holding all their logits.

It puts body and head together by itself, and so must be told of all that a model does to its logits. Models that it
doesn't know, those from remote code above all, are found out here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from qlora_trainer.evaluation import measuring
from qlorajob.errors import first_line

TOKENS = 64
TOLERANCE = 0.01
"""Of the loss; both round logits to 16 bit, which is a tenth of that."""


def why_not_fused(model: Any) -> str | None:
    """Why the model's own loss has to be taken, or None. Tries a few tokens; SFTTrainer has put the head in.

    Raises torch.OutOfMemoryError.
    """
    ids = (torch.arange(TOKENS, device=model.device) % model.config.get_text_config().vocab_size)[None]
    with measuring(model):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        expected = functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        try:
            found = -model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a model's own code, whatever it is
            return f"TRL's fused head fails here: {first_line(error)}"
    if not torch.allclose(found.float(), expected, rtol=TOLERANCE):  # nan is close to nothing
        return f"the loss of TRL's fused head is {float(found):.3f} where it should be {float(expected):.3f}"
    return None
