"""Heads that have learned nothing: made of the last layer of their target."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slipstream.drafter.head import layout
from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import decoder_config
from slipstream.engine.testing.local import TINY_LLAMA as TARGET


@pytest.mark.parametrize(
    "more",
    [
        {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"},
        {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ],
    ids=["gemma", "mixture"],
)
def test_a_cold_head_takes_of_another_kind_of_layer_what_it_has_a_place_for(more: dict[str, Any]) -> None:
    """A head's layer is one of Llama's: its norms multiply by their weights, and it has one MLP."""
    described = {key: value for key, value in TARGET.items() if key != "hidden_act"} | more
    target, parameters = decoder_config(described), dict(dummy_tensors(described, 0))
    config = layout.config_for(target, 40, taps=(0, 1, 3))
    weights = layout.from_target(config, layout.last_layer(parameters.items(), target.shape.num_layers), range(40))
    assert config.layer_shape(target).is_plain
    is_gemma = target.layer.is_gemma
    for name in ("midlayer.hidden_norm.weight", "midlayer.post_attention_layernorm.weight", "norm.weight"):
        assert torch.equal(weights[name], torch.full((target.hidden,), 2.0 if is_gemma else 1.0))
    assert bool(weights["midlayer.mlp.down_proj.weight"].any()) == is_gemma


@pytest.mark.parametrize("draft_tokens", [[1, 2, 3], [1, 1, 2, 3], [1, 2, 3, 96], [-1, 1, 2, 3]])
def test_a_cold_head_needs_as_many_tokens_as_it_can_draft(draft_tokens: list[int]) -> None:
    parameters = layout.last_layer(dummy_tensors(TARGET, 0), 4)
    with pytest.raises(ModelError, match="4 different tokens"):
        layout.from_target(layout.config_for(decoder_config(TARGET), 4), parameters, draft_tokens)
