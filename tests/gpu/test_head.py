"""TRL's fused head on a GPU: taken where its loss is the model's own, left where it isn't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from qlora_trainer.head import why_not_fused
from qlora_trainer.quirks import tell_output_head
from tests.support.chatglm.configuration_chatglm import ChatGLMConfig
from tests.support.chatglm.modeling_chatglm import ChatGLMForConditionalGeneration
from tests.support.families import SMALL

KNOWN = {
    "llama": {},
    "gpt_neox": {},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.0625},
    "phi": {},
}


def _model(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda()


@pytest.mark.parametrize("family", KNOWN)
def test_a_head_that_it_knows_is_taken(family: str) -> None:
    model = _model(AutoConfig.for_model(family, **SMALL | {"vocab_size": 1000} | KNOWN[family]))
    add_fused_lm_head(model)
    assert why_not_fused(model) is None


def test_what_a_model_does_to_its_logits_behind_the_head_is_found_out() -> None:
    model = _model(AutoConfig.for_model("llama", **SMALL | {"vocab_size": 1000}))
    add_fused_lm_head(model)
    model.lm_head.register_forward_hook(lambda module, args, logits: 30 * logits)
    assert "the loss of TRL's fused head is" in (why_not_fused(model) or "")


def test_a_model_that_it_cannot_take_apart_keeps_its_own_loss() -> None:
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig()).cuda()
    tell_output_head(model)
    add_fused_lm_head(model)
    assert "TRL's fused head fails here" in (why_not_fused(model) or "")
