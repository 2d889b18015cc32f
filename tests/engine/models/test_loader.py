"""What a model computes in, and with how many threads, where nobody says so."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.drafter.choice import make_drafters
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError, ModelError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models import loader
from slipstream.engine.models.decoder import Decoder
from slipstream.engine.models.gpu_memory import MOST_PENDING, head_bytes, pending_bytes
from slipstream.engine.models.loader import load_model
from slipstream.engine.models.weights import ahead
from slipstream.engine.testing.local import TINY_LLAMA, LocalEngine
from slipstream.kernels.batch import RaggedBatch
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


def test_a_gpu_is_named_by_its_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device, which groups of trainers need, refuses one without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    entered: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", entered.append, raising=False)
    for asked in ("cuda", "auto"):
        torch.cuda.set_device(loader.find_device(config(folder, device=asked)))
    assert entered == [0, 0] and loader.find_device(config(folder, device="cpu")) == torch.device("cpu")


MIB = 1 << 20


@pytest.fixture
def as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of the CPU as if it were that of a GPU: 100 MiB, of which others have 20, and steps take 7."""
    monkeypatch.setattr(loader, "has_own_memory", lambda device: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * MIB, 100 * MIB))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10 * MIB)
    monkeypatch.setattr(loader, "HEADROOM_BYTES", 5 * MIB)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_gpu_is_filled_with_cache(folder: Path, as_a_gpu: None, kernels: str) -> None:
    """Up to the share that may be used, less weights, what a step took when one was tried, graphs, and headroom."""
    options = {"kernels": kernels, "kv_cache_memory": None, "graph_memory": "4MiB", "max_step_tokens": 700}
    loaded = load_model(config(folder, **options, gpu_memory_utilization=0.8))
    left = 80 * MIB - 20 * MIB - loaded.weights_bytes - 7 * MIB - 4 * MIB - 5 * MIB
    assert loaded.num_blocks == left // loaded.block_bytes
    assert load_model(config(folder, **(options | {"kv_cache_memory": "1MiB"}))).num_blocks == MIB // loaded.block_bytes


@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_no_step_on_a_gpu_is_larger_than_the_one_that_was_tried(
    folder: Path, as_a_gpu: None, monkeypatch: pytest.MonkeyPatch, speculation: str
) -> None:
    """In tokens, and in rows of logits: with draft tokens a request has several of both."""
    sizes: list[tuple[int, int]] = []
    forward, logits = Decoder.forward, Decoder.logits

    def seen(model: Decoder, batch: RaggedBatch, *others: Any, **more: Any) -> Any:
        sizes.append((batch.num_tokens, 0))
        return forward(model, batch, *others, **more)

    def asked(model: Decoder, hidden: Tensor, rows: Any) -> Tensor:
        sizes.append((0, len(rows)))
        return logits(model, hidden, rows)

    monkeypatch.setattr(Decoder, "forward", seen)
    monkeypatch.setattr(Decoder, "logits", asked)
    options: dict[str, object] = {"max_running": 4, "max_step_tokens": 12, "max_draft_tokens": 6}
    options |= {"speculation": speculation, "speculation_policy": "fixed", "graph_memory": "0"}
    asked_for = config(folder, **options)
    load_model(asked_for)
    tried = [max(column) for column in zip(*sizes, strict=True)]
    local = LocalEngine(asked_for, make_drafters(asked_for) if speculation != "off" else ())
    sizes.clear()
    for _ in range(4):
        local.submit([1, 2, 3] * 6, SamplingParams(max_tokens=12, temperature=0.0))
    local.finish()
    local.close()
    largest = [max(column) for column in zip(*sizes, strict=True)]
    assert largest[0] <= tried[0] and largest[1] <= tried[1]
    assert largest[1] > 4 or speculation == "off", "no draft token was verified"


def test_drafters_have_room_on_a_gpu_beside_the_cache(folder: Path, as_a_gpu: None) -> None:
    """A draft model keeps as many tokens as the model, and has weights and graphs of its own; a head has a layer,
    weights, and hidden states that wait for it."""
    options = {"kv_cache_memory": None, "graph_memory": "4MiB", "gpu_memory_utilization": 0.8, "max_running": 4}
    alone = load_model(config(folder, **options, speculation="off", draft_model=str(folder)))
    left = 80 * MIB - 20 * MIB - alone.weights_bytes - 7 * MIB - 4 * MIB - 5 * MIB
    assert alone.num_blocks == left // alone.block_bytes
    layers, draft = alone.model.shape.num_layers, {"draft_model": str(folder)}
    twice = load_model(config(folder, **options, **draft))
    assert twice.num_blocks == (left - alone.weights_bytes - 4 * MIB) // (2 * alone.block_bytes)
    for requests in (1, 4, 1000):  # of many, no more waits than there is in the cache
        headed = load_model(config(folder, **(options | {"max_running": requests}), drafter="cold"))
        assert headed.model.decoder is not None
        sizes = headed.model.decoder.config, headed.model.formats.compute
        blocks = headed.num_blocks
        waiting = min(requests * MOST_PENDING, blocks * 16) * pending_bytes(*sizes)
        taken = blocks * headed.block_bytes * (layers + 1) // layers + waiting
        over = headed.block_bytes * (layers + 1) // layers + 16 * pending_bytes(*sizes)
        assert 0 <= left - head_bytes(*sizes) - taken < over


def test_what_a_gpu_has_no_room_for_is_said_with_numbers(folder: Path, as_a_gpu: None) -> None:
    with pytest.raises(
        ModelError, match=r"64MiB does not fit.*beside the weights.* left within --gpu-memory-utilization 0\.8"
    ):
        load_model(config(folder, kv_cache_memory="64MiB", graph_memory="0", gpu_memory_utilization=0.8))
    with pytest.raises(
        ModelError, match=r"does not fit: it needs .*MiB are free within --gpu-memory-utilization 0\.21"
    ):
        load_model(config(folder, graph_memory="0", gpu_memory_utilization=0.21))
    with pytest.raises(ConfigError, match=r"--gpu-memory-utilization 1\.5"):
        config(folder, gpu_memory_utilization=1.5)
    with pytest.raises(ConfigError, match=r"--graph-memory 'much' is not a size"):
        config(folder, graph_memory="much")


def test_the_least_cache_that_is_named_is_enough(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--kv-cache-memory 1KiB is too small; at least \d+\.\d KiB") as refused:
        load_model(config(folder, kv_cache_memory="1KiB", max_model_len=32))
    named = str(refused.value).partition("at least ")[2].removesuffix(" are needed")
    assert load_model(config(folder, kv_cache_memory=named, max_model_len=32)).max_model_len == 32


def test_the_next_tensor_is_made_while_one_is_used_and_errors_reach_whoever_loads() -> None:
    second = threading.Event()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "0", torch.zeros(1)
        second.set()
        yield "1", torch.ones(1)
        raise ModelError("the file ends")

    taken = []
    with pytest.raises(ModelError, match="the file ends"):
        for name, tensor in ahead(tensors()):
            assert second.wait(300)
            taken.append((name, int(tensor)))
    assert taken == [("0", 0), ("1", 1)]
