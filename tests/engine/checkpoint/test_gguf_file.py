"""The GGUF parser, against gguf's own reader and against damaged files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.checkpoint import locate
from slipstream.engine.checkpoint.gguf_file import TENSOR_TYPES, GGUFFile
from slipstream.engine.errors import ModelError

ROWS, COLUMNS = 3, 512


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], metadata: dict[str, Any] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (metadata or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, gguf.GGUFValueType.INT64 if kind == gguf.GGUFValueType.INT32 else kind)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(kind: str) -> np.ndarray:
    """Quantised by the library where it can, else random block bytes, for every byte pattern is a valid block."""
    random = np.random.default_rng(3)
    values = random.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    if kind.endswith("_K") or kind.startswith("IQ"):
        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        return random.integers(0, 256, (ROWS, COLUMNS // elements * size), dtype=np.uint8)
    data: np.ndarray = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    return data


def test_block_sizes_are_those_of_the_library() -> None:
    for number, kind in TENSOR_TYPES.items():
        library_kind = gguf.GGMLQuantizationType(number)
        assert library_kind.name == kind.name
        assert gguf.GGML_QUANT_SIZES[library_kind] == (kind.block_elements, kind.block_bytes)


@pytest.mark.parametrize("kind", [kind.name for kind in TENSOR_TYPES.values()])
def test_dequantises_every_type_like_the_library(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "one.gguf", {"other": (packed("F32"), "F32"), "a": (packed(kind), kind)})
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["a"]
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(reference.data, reference.tensor_type)
    found = GGUFFile(path).tensor("a")
    assert found.dtype == np.float32
    assert found.shape == (ROWS, COLUMNS)
    np.testing.assert_array_equal(found, expected.reshape(ROWS, COLUMNS))


def test_large_tensors_are_dequantised_in_chunks(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((700, 1024), dtype=np.float32)
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    path = write(tmp_path / "large.gguf", {"a": (data, "Q8_0")})
    np.testing.assert_array_equal(
        GGUFFile(path).tensor("a"), gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
    )


scalars = st.one_of(
    st.integers(-(2**31), 2**31 - 1), st.booleans(), st.text(max_size=20), st.floats(width=32, allow_nan=False)
)
arrays = st.one_of(
    st.lists(st.text(max_size=9), min_size=1, max_size=5),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=5),
)


@given(metadata=st.dictionaries(st.text("abc.", min_size=1, max_size=5), st.one_of(scalars, arrays), max_size=6))
def test_metadata_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]) -> None:
    path = write(tmp_path_factory.mktemp("gguf") / "m.gguf", {"a": (packed("F32"), "F32")}, metadata)
    assert GGUFFile(path).metadata == {"general.architecture": "llama"} | metadata


def test_reads_the_default_model_like_the_library() -> None:
    path = locate("default")
    ours, reference = GGUFFile(path), gguf.GGUFReader(path)
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == field.contents(), key
    assert len(ours.tensors) == len(reference.tensors)
    for tensor in reference.tensors:
        info = ours.tensors[tensor.name]
        assert (info.offset, info.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert list(reversed(info.shape)) == tensor.shape.tolist()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(tmp_path / "small.gguf", {"weights": (packed("Q4_0"), "Q4_0")}, {"key": "value", "list": ["a", "b"]})


def patched(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path


def expect_error(path: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        GGUFFile(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_says_that_the_magic_is_wrong(small: Path) -> None:
    small.write_bytes(b"PK\x03\x04" + small.read_bytes()[4:])
    expect_error(small, "begins with b'PK", "instead of b'GGUF'")


def test_says_which_versions_are_supported(small: Path) -> None:
    content = small.read_bytes()
    small.write_bytes(content[:4] + struct.pack("<I", 1) + content[8:])
    expect_error(small, "version 1 is not supported, versions 2 and 3 are")
    small.write_bytes(content[:4] + struct.pack(">I", 3) + content[8:])
    expect_error(small, "big-endian")


def test_says_which_tensor_is_truncated(small: Path) -> None:
    small.write_bytes(small.read_bytes()[:-100])
    expect_error(small, "truncated", "'weights'", f"the file at byte {small.stat().st_size}")


def test_refuses_tensors_that_lie_in_the_same_bytes(tmp_path: Path) -> None:
    data = packed("Q4_0")
    path = write(tmp_path / "two.gguf", {"first": (data, "Q4_0"), "second": (data, "Q4_0")})
    second = struct.pack("<IQ", 2, -(-data.nbytes // 32) * 32)
    expect_error(patched(path, second, struct.pack("<IQ", 2, 32)), "'first' and 'second' lie in the same bytes")


def test_says_where_the_header_is_cut(small: Path) -> None:
    small.write_bytes(small.read_bytes()[:60])
    expect_error(small, "metadata", "byte")


def test_says_which_tensor_type_cannot_be_read(small: Path) -> None:
    kind, unknown = struct.pack("<QIQ", ROWS, 2, 0), struct.pack("<QIQ", ROWS, 99, 0)
    expect_error(patched(small, kind, unknown), "'weights'", "type 99", "Q4_K")


@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1])
def test_refuses_absurd_lengths(small: Path, length: int) -> None:
    expect_error(
        patched(small, struct.pack("<Q", 5) + b"value", struct.pack("<Q", length) + b"value"),
        "reaches past the end",
        "'key'",
    )


def test_refuses_absurd_counts(small: Path) -> None:
    content = small.read_bytes()
    small.write_bytes(content[:8] + struct.pack("<QQ", 1 << 60, 1) + content[24:])
    expect_error(small, "tensors, more than fit")


def test_an_array_is_read_when_it_is_asked_for(small: Path) -> None:
    """Most of a header is the vocabulary, which nobody but a tokenizer needs."""
    text = struct.pack("<Q", 1) + b"b"
    found = GGUFFile(patched(small, text, text[:-1] + b"\xff")).metadata
    assert list(found) == ["general.architecture", "key", "list"]
    assert found["key"] == "value"
    with pytest.raises(ModelError, match=r"small\.gguf is not a valid GGUF file: .* UTF-8 \(metadata 'list', byte"):
        found.get("list")


def test_refuses_arrays_that_reach_past_the_end(small: Path) -> None:
    first = struct.pack("<Q", 1) + b"a"
    expect_error(patched(small, first, struct.pack("<Q", 1 << 40) + b"a"), "reaches past the end", "'list'")


def test_empty_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    expect_error(tmp_path / "empty.gguf", "cannot read")
    expect_error(tmp_path / "missing.gguf", "No such file")


def test_unknown_tensor_name(small: Path) -> None:
    with pytest.raises(ModelError, match="has no tensor 'nothing'"):
        GGUFFile(small).tensor("nothing")
