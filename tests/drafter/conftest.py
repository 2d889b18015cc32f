"""Processes of this room: training workers, and those that write what others read; and a model that no head is for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forking import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    # The last one comes with the first optimizer, and takes as long as torch itself.
    forks = Forks("slipstream.drafter.training.worker", "slipstream.drafter.traffic.store", "torch._dynamo")
    yield forks
    forks.close()


@pytest.fixture
def opaque(tmp_path: Path) -> Path:
    """A folder with a model that is one of transformers', and does not show its hidden states."""
    neox = {"model_type": "gpt_neox", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96}
    neox |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
    (folder := tmp_path / "neox").mkdir()
    (folder / "config.json").write_text(json.dumps(neox))
    return folder
