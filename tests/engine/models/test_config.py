"""Configurations as they are found: what is not stated is as in transformers, and what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import decoder_config
from slipstream.engine.models.transformers_files import transformers_switch_length
from slipstream.engine.testing.local import TINY_LLAMA, LocalEngine

MIXTURE = {"num_experts": 4, "moe_intermediate_size": 32}
WINDOWED = {"use_sliding_window": True, "sliding_window": 16}


@pytest.mark.parametrize(
    ("kind", "config", "windows"),
    [
        ("llama", {"sliding_window": 16}, [0, 0, 0, 0]),
        ("mistral", {"sliding_window": 16}, [16, 16, 16, 16]),
        ("mistral", {"sliding_window": None}, [0, 0, 0, 0]),
        ("mistral", {}, [4096, 4096, 4096, 4096]),
        ("qwen2", {"sliding_window": 16}, [0, 0, 0, 0]),
        ("qwen2", WINDOWED, [0, 0, 0, 0]),  # the first 28 layers see everything
        ("qwen2", WINDOWED | {"max_window_layers": 1}, [0, 16, 16, 16]),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 3}, [0, 0, 0, 4096]),
        ("qwen3", WINDOWED | {"layer_types": ["sliding_attention", "full_attention"] * 2}, [16, 0, 16, 0]),
        ("qwen3_moe", WINDOWED | {"max_window_layers": 1} | MIXTURE, [16, 16, 16, 16]),
        ("gemma3_text", {"sliding_window_pattern": 2}, [4096, 0, 4096, 0]),
    ],
)
def test_windows(kind: str, config: dict[str, Any], windows: list[int]) -> None:
    assert list(decoder_config(TINY_LLAMA | config | {"model_type": kind}).windows) == windows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"num_key_value_heads": 8}, "4 attention heads cannot share 8"),
        ({"head_dim": 33}, "head of size 33"),
        ({"head_dim": 33, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rotary parameters"),
        ({"rope_scaling": {"type": "linear"}}, "mean nothing: .*factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rotary parameters"),
        ({"rope_theta": "large"}, "rope_theta = 'large', a positive number"),
        ({"rope_parameters": {"rope_theta": "large"}}, "mean nothing: .*large"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "by kinds of layers"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "none for all of a head of size 32",
        ),
        ({"rms_norm_eps": None}, "rms_norm_eps = None"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000, a positive whole number up to 1000"),
        ({"hidden_size": 10**30}, "hidden_size = 1000000000000000000000000000000, a positive"),
        ({"model_type": "qwen3_moe", "num_experts": 10**12}, "num_experts = 1000000000000, a positive"),
    ],
)
def test_what_kernels_could_not_compute_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | change))
    with pytest.raises(ModelError, match=message):
        LocalEngine(EngineConfig(model=str(tmp_path), load_format="dummy", kv_cache_memory="2MiB"))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"num_attention_heads": "4"}),
        ("llama", {"num_key_value_heads": [2]}),
        ("llama", {"hidden_size": 64.0}),
        ("llama", {"max_position_embeddings": -1}),
        ("llama", {"max_position_embeddings": float("inf")}),
        ("llama", {"rms_norm_eps": float("nan")}),
        ("llama", {"rms_norm_eps": -1e-6}),
        ("llama", {"rope_scaling": "linear"}),
        ("llama", {"rope_parameters": [1]}),
        ("llama", {"tie_word_embeddings": "false"}),
        ("llama", {"attention_bias": {}}),
        ("llama", {"hidden_act": 1}),
        ("llama", {"model_type": ["llama"]}),
        ("mistral", {"sliding_window": 16.5}),
        ("mistral", {"sliding_window": True}),
        ("qwen2", {"layer_types": "full_attention"}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": None}),
        ("qwen3_moe", MIXTURE | {"num_experts_per_tok": None}),
        ("qwen3_moe", MIXTURE | {"decoder_sparse_step": 0}),
        ("qwen3_moe", MIXTURE | {"mlp_only_layers": 1}),
        ("gemma3_text", {"query_pre_attn_scalar": 0}),
        ("gemma3_text", {"sliding_window_pattern": "2"}),
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(tmp_path: Path, family: str, change: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | {"model_type": family} | change))
    with pytest.raises(ModelError, match=rf"config\.json has {list(change)[-1]} = .* is needed"):
        open_checkpoint(tmp_path)


def test_kinds_of_layers_are_as_many_as_layers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | {"layer_types": ["full_attention"] * 3}))
    with pytest.raises(ModelError, match="3 layer_types for 4 layers"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "64"},
        {"attention_multiplier": None, "architectures": 5},
        {"num_attention_heads": 0},
        {"rope_scaling": {"rope_type": "none of these"}},
    ],
)
def test_what_transformers_refuses_is_an_error_of_the_model(tmp_path: Path, change: dict[str, Any]) -> None:
    """One line, whatever kind of error it is there."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | {"model_type": "granite"} | change))
    with pytest.raises(ModelError, match=r"^[^\n]*$"):
        LocalEngine(EngineConfig(model=str(tmp_path), load_format="dummy", kv_cache_memory="2MiB"))


def test_a_family_may_state_no_length() -> None:
    """RecurrentGemma turns positions, and says of no longest one."""
    assert transformers_switch_length({"model_type": "recurrent_gemma", "num_hidden_layers": 3}) == 0


@pytest.mark.parametrize(
    ("family", "silent", "heads", "size"),
    [("llama", {}, 4, 16), ("qwen3", {}, 32, 128), ("qwen3", {"num_key_value_heads": None}, 4, 128)],
)
def test_sizes_that_a_file_leaves_out_are_those_of_transformers(
    tmp_path: Path, family: str, silent: dict[str, Any], heads: int, size: int
) -> None:
    config = {key: value for key, value in TINY_LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": family} | silent))
    found = open_checkpoint(tmp_path).config
    assert (found.get("num_key_value_heads") or 4, found.get("head_dim") or 16) == (heads, size)


def test_scaling_that_was_put_into_a_newer_file_counts() -> None:
    """The base stays that of the file, which transformers forgets."""
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    scaled = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}
    found = decoder_config(TINY_LLAMA | newer | scaled)
    assert (found.rope["rope_type"], found.rope["rope_theta"]) == ("yarn", 1e6)
    assert found.shape.max_positions == 1024
