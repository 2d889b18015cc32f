"""A small target and heads for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from slipstream.drafter.head import layout
from slipstream.drafter.head.layout import HeadConfig
from slipstream.drafter.registry.registry import Registry
from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.models.config import decoder_config
from slipstream.engine.testing.local import TINY_LLAMA

TARGET = TINY_LLAMA | {"num_hidden_layers": 8}
Head = tuple[HeadConfig, dict[str, Tensor]]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TARGET))
    (folder / "tokenizer.json").write_text('{"tokens": []}')
    save_file(dict(dummy_tensors(TARGET, 0)), folder / "model.safetensors")
    return folder


@pytest.fixture
def make_head() -> Callable[[int], Head]:
    def make(seed: int) -> Head:
        config = layout.config_for(decoder_config(TARGET), 48)
        return config, layout.stored(layout.random_tensors(config, seed))

    return make


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")
