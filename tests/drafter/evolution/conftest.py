"""A tiny target, samples made by hand, and an engine with a tap."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from slipstream.drafter.evolution.store import Sample
from slipstream.engine.checkpoint.dummy import dummy_tensors

TARGET = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traffic-target")
    (path / "config.json").write_text(json.dumps(TARGET))
    tensors = {name: tensor * (8 if tensor.ndim == 2 else 1) for name, tensor in dummy_tensors(TARGET, 0)}
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    def make(length: int = 12, **fields: Any) -> Sample:
        rng = np.random.default_rng(length)
        known = {
            "tenant": "",
            "domain": "",
            "target_version": 0,
            "drafter_version": 0,
            "time": time.time(),
            "tokens": rng.integers(0, 96, length).astype(np.int32),
            "num_prompt": 5,
            "start": 2,
            "features": torch.arange((length - 3) * 3 * 4).view(-1, 3, 4).bfloat16(),
            "topk": None,
            "greedy": True,
        }
        return Sample(**(known | fields))

    return make
