"""Models that TRL's fused head can't take apart are found out before they train on what it makes of them."""

from __future__ import annotations

import torch
from trl.trainer.utils import add_fused_lm_head

from qlora_trainer.head import why_not_fused
from qlora_trainer.quirks import tell_output_head
from tests.support.chatglm.configuration_chatglm import ChatGLMConfig
from tests.support.chatglm.modeling_chatglm import ChatGLMForConditionalGeneration


def test_a_body_whose_hidden_states_are_token_by_token_keeps_its_own_loss() -> None:
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig()).train()
    tell_output_head(model)
    add_fused_lm_head(model)
    drawn = torch.random.get_rng_state()
    assert why_not_fused(model) == (
        "TRL's fused head fails here: The shape of the mask [1, 63] at index 0 does not match the shape of the indexed "
        "tensor [64, 0, 64] at index 0"
    )
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), drawn)
