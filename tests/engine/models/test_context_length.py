"""What the rotary parameters of model files say about the context, in every spelling they come in."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.engine.models.rope import context_length, switch_length

FACTORS = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0]}


@pytest.mark.parametrize(
    ("stated", "config", "expected"),
    [
        (4096, {}, 4096),
        (4096, {"rope_scaling": None}, 4096),
        # Qwen's recipe, with the spelling of its cards, of later ones and of transformers 5.
        (
            32768,
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),
        (32768, {"rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 4.0}}, 131072),
        (32768, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, 131072),
        (32768, {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 8192}, 32768),
        # The length is stated after scaling: DeepSeek-V3, gpt-oss.
        (163840, {"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}}, 163840),
        (
            131072,
            {"rope_scaling": {"rope_type": "yarn", "factor": 32, "original_max_position_embeddings": 4096}},
            131072,
        ),
        # Vicuna-16k and LongChat.
        (4096, {"rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        (2048, {"rope_scaling": {"type": "linear", "factor": 8.0}}, 16384),
        (2048, {"rope_scaling": {"type": "dynamic", "factor": 2.5}}, 5120),
        (
            131072,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}},
            131072,
        ),
        (131072, {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 4096}, 131072),
        # Gemma 3 scales its global layers only and states the result.
        (131072, {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 10000.0}, 131072),
        (
            131072,
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_type": "default"},
                }
            },
            131072,
        ),
        (32768, {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, 32768),
        (4096, {"rope_scaling": {"type": "linear", "factor": None}}, 4096),
        (4096, {"rope_scaling": {"type": "linear", "factor": "many"}}, 4096),
    ],
)
def test_context_length(stated: int, config: dict[str, Any], expected: int) -> None:
    assert context_length(config, stated) == expected


@pytest.mark.parametrize(
    ("stated", "config", "expected"),
    [
        (131072, {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 4096}, 4096),
        (131072, {"rope_scaling": {"type": "su", **FACTORS, "original_max_position_embeddings": 4096}}, 4096),
        # One set of factors: Llama 3's scaling as GGUF files state it.
        (
            131072,
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0, 8.0],
                    "long_factor": [1.0, 8.0],
                    "original_max_position_embeddings": 8192,
                }
            },
            0,
        ),
        (4096, {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 4096}, 0),
        (2048, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 2048),
        (2048, {"rope_scaling": {"type": "dynamic", "factor": 1.0}}, 0),
        (32768, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 0),
    ],
)
def test_switch_length(stated: int, config: dict[str, Any], expected: int) -> None:
    assert switch_length(config, stated) == expected
