"""Configurations as they are found: what is not stated is as in transformers, and what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import decoder_config
from slipstream.engine.testing import TINY_LLAMA, LocalEngine

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
        ({"rope_scaling": {"type": "linear"}}, "mean nothing: .*factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rotary parameters"),
        ({"rope_theta": "large"}, "mean nothing: .*large"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "none for all of a head of size 32",
        ),
        ({"rms_norm_eps": None}, "rms_norm_eps = None"),
    ],
)
def test_what_kernels_could_not_compute_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | change))
    with pytest.raises(ModelError, match=message):
        LocalEngine(EngineConfig(model=str(tmp_path), load_format="dummy", kv_cache_memory="2MiB"))
