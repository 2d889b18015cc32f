"""Whatever happens to a model's files, they load or raise ModelError, without taking much memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.errors import ModelError

MOST_MEMORY = 16 << 20
fuzz = settings(max_examples=150)
flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)
cut = st.none() | st.floats(0, 1)


def damage(content: bytes, changes: list[tuple[float, int]], keep: float | None) -> bytes:
    damaged = bytearray(content)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    return bytes(damaged if keep is None else damaged[: int(keep * len(damaged))])


def load(path: Path) -> None:
    tracemalloc.start()
    try:
        for _, tensor in open_checkpoint(path).tensors():
            tensor.sum()
    except ModelError as error:
        assert str(path) in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_MEMORY


@pytest.fixture
def gguf_bytes(tiny: Callable[..., dict[str, Any]], write_gguf: Callable[..., Path]) -> bytes:
    config = tiny("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=8, vocab_size=16)
    return write_gguf(config).read_bytes()


@fuzz
@given(changes=flips, keep=cut)
def test_gguf(gguf_bytes: bytes, tmp_path: Path, changes: list[tuple[float, int]], keep: float | None) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(gguf_bytes, changes, keep))
    load(path)


@fuzz
@given(changes=flips, keep=cut)
def test_gguf_header(gguf_bytes: bytes, tmp_path: Path, changes: list[tuple[float, int]], keep: float | None) -> None:
    path = tmp_path / "damaged.gguf"
    header = gguf_bytes.index(b"output_norm.weight") + 40
    rest = b"" if keep is not None else gguf_bytes[header:]
    path.write_bytes(damage(gguf_bytes[:header], changes, keep) + rest)
    load(path)


@fuzz
@given(
    file=st.sampled_from(["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]),
    in_header=st.booleans(),
    changes=flips,
    keep=cut,
)
def test_folder(
    tiny: Callable[..., dict[str, Any]],
    write_folder: Callable[..., Path],
    tmp_path: Path,
    file: str,
    in_header: bool,
    changes: list[tuple[float, int]],
    keep: float | None,
) -> None:
    if not (tmp_path / "model").exists():
        write_folder(tiny("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=8), shards=2)
    path = tmp_path / "model" / file
    content = path.read_bytes()
    header = 1000 if in_header and file.endswith(".safetensors") else len(content)
    path.write_bytes(damage(content[:header], changes, keep) + content[header:])
    try:
        load(tmp_path / "model")
    finally:
        path.write_bytes(content)
