"""What a model computes in, and with how many threads, where nobody says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slipstream.engine.config import EngineConfig
from slipstream.engine.models import loader
from slipstream.engine.models.loader import load_model
from slipstream.engine.testing import TINY_LLAMA
from slipstream.kernels.native.library import isa

BF16, F32 = torch.bfloat16, torch.float32
FALLBACK = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    return tmp_path


def config(folder: Path, **options: object) -> EngineConfig:
    known = {"model": str(folder), "load_format": "dummy", "kv_cache_memory": "4MiB", "threads": 2}
    return EngineConfig(**(known | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("fast", [F32, BF16])
def test_torch_computes_in_what_is_fast_here(folder: Path, monkeypatch: pytest.MonkeyPatch, fast: torch.dtype) -> None:
    monkeypatch.setattr(loader, "fast_dtype", lambda device: fast)
    assert load_model(config(folder, kernels="torch")).model.formats.compute is fast
    assert load_model(config(folder, kernels="torch", dtype="bfloat16")).model.formats.compute is BF16
    assert load_model(config(folder, kernels="torch", dtype="float32")).model.formats.compute is F32


def test_bfloat16_where_there_is_no_room_for_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "fast_dtype", lambda device: F32)
    half = load_model(config(folder, kernels="torch", dtype="bfloat16")).weights_bytes
    monkeypatch.setattr(loader, "HEADROOM_BYTES", -(1 << 30))
    monkeypatch.setattr(loader, "available_memory", lambda device: 3 * half)
    assert load_model(config(folder, kernels="torch")).model.formats.compute is BF16


@pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
def test_compiled_kernels_have_their_own_arithmetic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "fast_dtype", lambda device: F32)
    assert load_model(config(folder)).model.formats.compute is BF16
    assert torch.get_num_threads() == 1, "torch has little to do beside them"


def test_a_model_that_torch_computes_has_all_threads(folder: Path) -> None:
    """Also where there are compiled kernels for others."""
    (folder / "config.json").write_text(json.dumps(FALLBACK))
    assert load_model(config(folder)).model.kernels == "transformers-cpu"
    assert torch.get_num_threads() == 2
