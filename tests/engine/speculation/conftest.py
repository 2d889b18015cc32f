"""A tiny model with a vocabulary of eight tokens, and an engine that runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from slipstream.engine.config import EngineConfig
from slipstream.engine.operations import UseVocabulary
from slipstream.engine.speculation.protocol import Drafter
from slipstream.engine.testing.gguf import write_gguf
from slipstream.engine.testing.local import LocalEngine, policy, write_policy

CONFIG = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
TOKENS = [b"a", b"b", b"ab", b"ba", b"(", b")", b"()", b"<end>"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("tiny"), policy(0, CONFIG, 20), CONFIG)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with weights that are quantised, in all kinds of forms."""
    return write_gguf(tmp_path_factory.mktemp("packed") / "tiny.gguf", policy(0, CONFIG, 20), CONFIG)


@pytest.fixture(scope="session")
def engine(tiny: Path) -> Callable[..., LocalEngine]:
    def make(drafters: Sequence[Drafter] = (), **fields: Any) -> LocalEngine:
        options = {"max_running": 128, "kv_cache_memory": "16MiB", "speculation_policy": "fixed", "max_draft_tokens": 4}
        options |= {"max_step_tokens": 16384, "step_latency_ms": 1000.0, "model": str(tiny), "dtype": "float32"}
        local = LocalEngine(EngineConfig(**(options | fields)), drafters)
        local.engine.operate(UseVocabulary(TOKENS, [7]))
        return local

    return make
