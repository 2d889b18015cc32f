"""--kv-cache-dtype: whatever runs the model keeps keys and values so, in half the memory, or says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.models.attention import attention_choice
from slipstream.engine.models.loader import load_model
from slipstream.kernels.batch import make_batch
from slipstream.kernels.compute import Formats
from slipstream.kernels.native import library
from slipstream.kernels.triton import launch

CPU = torch.device("cpu")
ENTRIES = json.loads(Path(__file__).with_name("families.json").read_text())
FAMILIES: dict[str, dict[str, Any]] = {entry["family"]: entry["config"] for entry in ENTRIES}
TINY = FAMILIES["Llama 3.x"]
KERNELS = ["torch"] + (["native"] if library.load() is not None else [])
LOST = {"int8": 0.05, "fp8": 0.15, "fp8_e4m3": 0.15}


def logits(folder: Path, **options: Any) -> torch.Tensor:
    """Those of all places of a text that comes in two steps."""
    fields = {"dtype": "float32", "kv_cache_memory": "2MiB", "speculation": "off", "threads": 1}
    loaded = load_model(EngineConfig(model=str(folder), **(fields | options)))
    model, ids = loaded.model, np.random.default_rng(0).integers(5, 150, 90).astype(np.int32)
    cache = model.new_cache(6, 16)
    assert cache.shape.dtype is model.formats.kv
    assert cache.num_bytes == 6 * loaded.block_bytes
    found, table = [], np.arange(6, dtype=np.int32)[None]
    for begin, end in ((0, 70), (70, 90)):
        count, length = np.array([end - begin], np.int32), np.array([end], np.int32)
        batch = make_batch(ids[begin:end], count, length, table, np.zeros(1, np.int32), 16)
        with torch.inference_mode():
            hidden = model.forward(batch, cache).hidden
            found.append(model.logits(hidden, np.arange(end - begin, dtype=np.int32)).clone())
    return torch.cat(found)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    lost = float((found - expected).norm() / expected.norm())
    assert 0 < lost < LOST[dtype], "as exact as without would say that nothing was kept in 8 bits"


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", list(LOST))
def test_little_is_lost(tiny_model: Callable[[dict[str, Any]], Any], kernels: str, dtype: str) -> None:
    folder = tiny_model(TINY).folder
    plain, kept = (logits(folder, kernels=kernels, **more) for more in ({}, {"kv_cache_dtype": dtype}))
    assert_close(kept, plain, dtype)


@pytest.mark.parametrize("family", ["Gemma 2", "gpt-oss"])
def test_so_it_is_with_windows_soft_caps_and_sinks(tiny_model: Callable[[dict[str, Any]], Any], family: str) -> None:
    """By transformers' code."""
    folder = tiny_model(FAMILIES[family]).folder
    for dtype in ("int8", "fp8"):
        assert_close(logits(folder, kv_cache_dtype=dtype), logits(folder), dtype)


def test_the_same_memory_holds_nearly_twice_the_tokens(tiny_model: Callable[[dict[str, Any]], Any]) -> None:
    folder = tiny_model(TINY).folder
    counted = {}
    for dtype in ("auto", "int8", "fp8"):
        options = {"dtype": "bfloat16", "kv_cache_memory": "1MiB", "kv_cache_dtype": dtype}
        counted[dtype] = load_model(EngineConfig(model=str(folder), **options)).num_blocks
    head_dim = TINY["hidden_size"] // TINY["num_attention_heads"]
    assert counted["int8"] == counted["fp8"]
    assert counted["int8"] / counted["auto"] == pytest.approx(2 * head_dim / (head_dim + 2), rel=0.02)


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: int, **options: Any) -> None:
    monkeypatch.setattr(launch, "capability", lambda _: capability)
    kept = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[options["kv_cache_dtype"]]
    formats = Formats("bfloat16", torch.bfloat16, kept)
    attention_choice(TINY, EngineConfig(**options), formats, CPU)


def test_an_older_gpu_and_other_attention_say_that_they_do_not_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"capability 8\.0 .* 8\.9; use --kv-cache-dtype int8"):
        on_gpu(monkeypatch, 80, kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match=r"--attention-backend flashinfer: .*8-bit cache"):
        on_gpu(monkeypatch, 90, kv_cache_dtype="int8", attention_backend="flashinfer")
    if launch.runs_on("cpu"):
        on_gpu(monkeypatch, 80, kv_cache_dtype="int8")
        on_gpu(monkeypatch, 89, kv_cache_dtype="fp8")
