"""Random weights for --load-format dummy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.errors import ModelError

VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 32}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True}),
]


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_names_and_shapes_are_those_of_transformers(
    tiny: Callable[..., dict[str, Any]], model_type: str, changes: dict[str, Any]
) -> None:
    config = tiny(model_type, **changes)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).state_dict()
    if config["tie_word_embeddings"]:
        reference.pop("lm_head.weight")
    found = {name: tensor.shape for name, tensor in dummy_tensors(config, 0)}
    assert found == {name: tensor.shape for name, tensor in reference.items()}


def test_values(tiny: Callable[..., dict[str, Any]]) -> None:
    config = tiny("qwen2")
    first, again, other = (dict(dummy_tensors(config, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    weights = [name for name in first if not name.endswith(("norm.weight", ".bias"))]
    assert not any(torch.equal(first[name], other[name]) for name in weights)
    values = torch.cat([first[name].flatten() for name in weights])
    assert abs(values.mean()) < 1e-3
    assert values.std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(first["model.norm.weight"], torch.ones(64))
    assert torch.equal(first["model.layers.1.self_attn.k_proj.bias"], torch.zeros(32))


def test_errors(tiny: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ModelError, match="not for 'gpt2'"):
        list(dummy_tensors(tiny("gpt2"), 0))
    with pytest.raises(ModelError, match="hidden_size = 'big'"):
        list(dummy_tensors(tiny(hidden_size="big"), 0))
