"""A pytest plugin that writes down what tests have the compiled kernels do, for processors on which tests cannot run.

``pytest -p recording`` with the name of a file in SLIPSTREAM_RECORDING: calls through the C interface, with all memory
that they read, and what they wrote, go to the file, but for many of the same test and for large ones. What is recorded
is right if the tests passed. ``replay.cpp`` makes the same calls; ``scripts/prove_kernels.py`` runs both.

The file: for each call its name, its test and its arguments; memory as blobs with the places in them that point into
other blobs. All numbers are little-endian. A number of bytes comes before whatever has no fixed size.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream.kernels.native import library
from slipstream.kernels.native.library import CAttention, CBatch, CLayer, CLinear, CModel, CPart

CALLS_EACH = 8
"""Calls of one function by one test with the same parameters; properties draw more examples than say something new."""
LARGEST, LARGEST_FORWARD = 1 << 18, 1 << 21
"""Bytes of a call, and of one of a whole model; larger ones take long under emulation."""
F32, BF16 = 0, 1
EXACT, FLOAT, HALF, WEIGHTS = range(4)
"""How what was written is compared: by bytes; as float32 or bfloat16, relative to the largest; as float32 of which one
per row, on a border, may be there or not."""
SUMS = {F32: 2e-5, BF16: 2e-5}
"""Largest difference of sums of products, relative to the largest: another order of adding up."""
ROUNDED = {F32: 2e-5, BF16: 1.6e-2}
"""The same where numbers between were rounded to the format (``slipstream.kernels.cases.TOLERANCE``)."""
WHOLE = (1, 2)
"""Arithmetic of packed weights, int8 and int16, whose sums are whole: the same on every instruction set."""
DEEP = {F32: 2e-4, BF16: 6e-2}
"""The same behind some layers."""


class Call:
    """Memory of one call, before it and after."""

    def __init__(self) -> None:
        self.blobs: list[tuple[int, int, bytearray, int, float, int]] = []
        self.pointers: list[tuple[int, int, int, int]] = []
        self.arguments: list[tuple[int, int, int]] = []

    def number(self, value: int) -> None:
        self.arguments.append((0, int(value), 0))

    def pointer(self, blob: int | None) -> None:
        self.arguments.append((0, 0, 0) if blob is None else (1, blob, 0))

    def workspace(self, tokens: int) -> None:
        """Memory for a model and so many tokens, which whoever replays the call allocates."""
        self.arguments.append((2, tokens, 0))

    def reads(self, address: int | None, size: int) -> int | None:
        return self._blob(address, size, -1, 0.0, 0)

    def writes(self, address: int | None, size: int, kind: int, tolerance: float = 0.0, row: int = 0) -> int | None:
        """``row``: numbers of a row, for WEIGHTS."""
        return self._blob(address, size, kind, tolerance, row)

    def struct(self, value: ctypes.Structure | bytes, pointers: dict[int, int | None]) -> int:
        """``pointers``: blobs by offset of the field; all other pointers are null."""
        content = bytearray(bytes(value))
        blob = len(self.blobs)
        self.blobs.append((0, len(content), content, -1, 0.0, 0))
        for offset, target in pointers.items():
            content[offset : offset + 8] = bytes(8)
            if target is not None:
                self.pointers.append((blob, offset, target, 0))
        return blob

    def _blob(self, address: int | None, size: int, kind: int, tolerance: float, row: int) -> int | None:
        if not address:
            return None
        self.blobs.append((address, size, bytearray(ctypes.string_at(address, size)), kind, tolerance, row))
        return len(self.blobs) - 1

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size, *_ in self.blobs)

    def serialised(self, name: str, test: str) -> bytes:
        """To be called after the call itself: what it wrote is read now."""
        parts = [_text(name), _text(test), struct.pack("<I", len(self.blobs))]
        for address, size, before, kind, tolerance, row in self.blobs:
            parts.append(struct.pack("<QifI", size, kind, tolerance, row))
            parts.append(bytes(before))
            if kind >= 0:
                parts.append(ctypes.string_at(address, size))
        parts.append(struct.pack("<I", len(self.pointers)))
        parts += [struct.pack("<IQIQ", *pointer) for pointer in self.pointers]
        parts.append(struct.pack("<I", len(self.arguments)))
        parts += [struct.pack("<Iqq", *argument) for argument in self.arguments]
        return b"".join(parts)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<I", len(encoded)) + encoded


def _at(kind: type[Any], argument: Any) -> Any:
    """The struct that an argument of a call points to."""
    return argument._obj if hasattr(argument, "_obj") else kind.from_address(argument)


def _size(dtype: int) -> int:
    return 2 if dtype == BF16 else 4


def _ints(address: int, count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.frombuffer(ctypes.string_at(address, 4 * count), np.int32)


def _linear(call: Call, c: CLinear, dtype: int, at: int) -> Iterator[tuple[int, int | None]]:
    """Blobs that the struct at an offset of another points to."""
    panels = -(-c.n // 64) * 64 * c.k * _size(dtype)
    yield at + CLinear.panels.offset, call.reads(c.panels, panels)
    yield at + CLinear.bias.offset, call.reads(c.bias, 4 * c.n)
    if c.num_parts:
        native, parts = library.load(), c.parts[: c.num_parts]
        assert native is not None
        data = [call.reads(part.data, native.slip_part_bytes(part.form, part.panels, c.k)) for part in parts]
        places = {i * ctypes.sizeof(CPart) + CPart.data.offset: blob for i, blob in enumerate(data)}
        yield at + CLinear.parts.offset, call.struct(b"".join(map(bytes, parts)), places)
    else:
        yield at + CLinear.parts.offset, None


def _no_linear(at: int) -> dict[int, int | None]:
    return dict.fromkeys(at + getattr(CLinear, name).offset for name in ("panels", "bias", "parts"))


class Cache:
    """What a batch touches of a cache."""

    def __init__(self, call: Call, c: CBatch) -> None:
        q_start = _ints(c.q_start, c.num_segments + 1)
        kv_len, rows = _ints(c.kv_len, c.num_segments), _ints(c.table_row, c.num_segments)
        self.positions = int(kv_len.max(initial=1))
        per_block = 16 * c.tiles_per_block
        wide = int(rows.max(initial=0)) * c.table_stride + -(-self.positions // per_block)
        tables, mirrors = _ints(c.block_tables, wide), _ints(c.mirrors, 3 * c.num_mirrors)
        blocks = [
            int(block)
            for length, row in zip(kv_len.tolist(), rows.tolist(), strict=True)
            for block in tables[row * c.table_stride :][: -(-length // per_block)]
        ]
        self.tiles = (max([*blocks, *mirrors[1::3].tolist()]) + 1) * c.tiles_per_block
        arrays = {
            "token_ids": call.reads(c.token_ids, 4 * c.num_tokens),
            "q_start": call.reads(c.q_start, 4 * len(q_start)),
            "kv_len": call.reads(c.kv_len, 4 * len(kv_len)),
            "block_tables": call.reads(c.block_tables, 4 * wide),
            "table_row": call.reads(c.table_row, 4 * len(rows)),
            "mirrors": call.reads(c.mirrors, 4 * len(mirrors)),
        }
        self.batch = call.struct(c, {getattr(CBatch, name).offset: blob for name, blob in arrays.items()})

    def size(self, kv_heads: int, head_dim: int, dtype: int, form: int) -> int:
        return self.tiles * kv_heads * head_dim * 16 * (1 if form else _size(dtype))

    def scales(self, kv_heads: int) -> int:
        """Bytes of those of keys, or of values, that are kept in 8 bits."""
        return self.tiles * kv_heads * 16 * 2


def _settings(call: Call, shape: CAttention, cache: Cache, kind: int) -> int:
    """``kind`` of what is written to scales; -1 where they are read."""
    places = {name: getattr(CAttention, name).offset for name in ("k_scales", "v_scales")}
    return call.struct(
        shape,
        {at: call.writes(getattr(shape, name), cache.scales(shape.kv_heads), kind) for name, at in places.items()},
    )


def linear(call: Call, dtype: int, w: Any, x: int, rows: int, out: int, ld: int) -> None:
    c = _at(CLinear, w)
    call.number(dtype)
    call.pointer(call.struct(c, dict(_linear(call, c, dtype, 0))))
    call.pointer(call.reads(x, 4 * rows * c.k))
    call.number(rows)
    is_whole = c.num_parts and c.arithmetic in WHOLE
    call.pointer(call.writes(out, 4 * rows * ld, FLOAT, 0.0 if is_whole else SUMS[dtype]))
    call.number(ld)


def store_kv(call: Call, a: Any, b: Any, k: int, v: int, k_cache: int, v_cache: int) -> None:
    shape, batch = _at(CAttention, a), _at(CBatch, b)
    cache = Cache(call, batch)
    call.pointer(_settings(call, shape, cache, EXACT))
    call.pointer(cache.batch)
    for each in (k, v):
        call.pointer(call.reads(each, 4 * batch.num_tokens * shape.kv_heads * shape.head_dim))
    for each in (k_cache, v_cache):
        size = cache.size(shape.kv_heads, shape.head_dim, shape.dtype, shape.cache_form)
        call.pointer(call.writes(each, size, EXACT))


def attention(call: Call, a: Any, b: Any, q: int, k_cache: int, v_cache: int, out: int) -> None:
    shape, batch = _at(CAttention, a), _at(CBatch, b)
    cache = Cache(call, batch)
    rows = 4 * batch.num_tokens * shape.heads * shape.head_dim
    call.pointer(_settings(call, shape, cache, -1))
    call.pointer(cache.batch)
    call.pointer(call.reads(q, rows))
    for each in (k_cache, v_cache):
        call.pointer(call.reads(each, cache.size(shape.kv_heads, shape.head_dim, shape.dtype, shape.cache_form)))
    call.pointer(call.writes(out, rows, FLOAT, ROUNDED[shape.dtype]))


def _model(call: Call, m: CModel, cache: Cache | None, tokens: int) -> int:
    """Without a cache, what logits need."""
    pointers = dict.fromkeys(
        getattr(CModel, name).offset for name, kind in CModel._fields_ if kind in (ctypes.c_void_p,) or name == "layers"
    )
    if cache is None:
        pointers |= _no_linear(CModel.embed.offset)
        pointers |= dict(_linear(call, m.lm_head, m.dtype, CModel.lm_head.offset))
        pointers[CModel.final_norm.offset] = call.reads(m.final_norm, 4 * m.hidden)
        layers = [m.layers[0]] if m.num_layers else []
        pointers[CModel.layers.offset] = _layers(call, m, layers, None)
        return call.struct(m, pointers)
    layers = [m.layers[i] for i in range(m.num_layers)]
    pointers |= dict(_linear(call, m.embed, m.dtype, CModel.embed.offset))
    # Threads without work read its beginning, if it is quantised, when the last layer is done.
    pointers |= dict(_linear(call, m.lm_head, m.dtype, CModel.lm_head.offset))
    angles = 4 * cache.positions * (m.head_dim // 2)
    pointers[CModel.rope_cos.offset] = call.reads(m.rope_cos, angles)
    pointers[CModel.rope_sin.offset] = call.reads(m.rope_sin, angles)
    pointers[CModel.taps.offset] = call.reads(m.taps, 4 * m.num_taps)
    features = call.writes(m.features, 4 * tokens * m.num_taps * m.hidden, FLOAT, DEEP[m.dtype])
    pointers[CModel.features.offset] = features
    pointers[CModel.layers.offset] = _layers(call, m, layers, cache)
    return call.struct(m, pointers)


def _layers(call: Call, m: CModel, layers: list[CLayer], cache: Cache | None) -> int:
    pointers: dict[int, int | None] = {}
    for index, layer in enumerate(layers):
        at = index * ctypes.sizeof(CLayer)
        for name, width in (
            *(("attn_norm", m.hidden), ("embed_norm", m.hidden), ("mlp_norm", m.hidden)),
            *(("q_norm", m.head_dim), ("k_norm", m.head_dim)),
        ):
            pointers[at + getattr(CLayer, name).offset] = call.reads(getattr(layer, name), 4 * width)
        for name in ("qkv", "out", "gate_up", "down"):
            offset = at + getattr(CLayer, name).offset
            if cache is None:
                pointers |= _no_linear(offset)
            else:
                pointers |= dict(_linear(call, getattr(layer, name), m.dtype, offset))
        for name in ("k_cache", "v_cache"):
            size = 0 if cache is None else cache.size(m.kv_heads, m.head_dim, m.dtype, m.cache_form)
            kind = -1 if m.cache_form else HALF if m.dtype == BF16 else FLOAT  # a sum may be at the border of two bytes
            blob = call.writes(getattr(layer, name), size, kind, DEEP[m.dtype]) if size else None
            pointers[at + getattr(CLayer, name).offset] = blob
        for name in ("k_scales", "v_scales"):
            size = 0 if cache is None else cache.scales(m.kv_heads)
            pointers[at + getattr(CLayer, name).offset] = call.reads(getattr(layer, name), size) if size else None
    return call.struct(b"".join(map(bytes, layers)), pointers)


def forward(call: Call, m: Any, b: Any, hidden: int, workspace: int) -> None:
    model, batch = _at(CModel, m), _at(CBatch, b)
    cache = Cache(call, batch)
    call.pointer(_model(call, model, cache, batch.num_tokens))
    call.pointer(cache.batch)
    call.pointer(call.writes(hidden, 4 * batch.num_tokens * model.hidden, FLOAT, DEEP[model.dtype]))
    call.workspace(batch.num_tokens)


def logits(call: Call, m: Any, hidden: int, rows: int, count: int, out: int, vocab: int, workspace: int) -> None:
    model = _at(CModel, m)
    last = int(_ints(rows, count).max(initial=0)) + 1
    call.pointer(_model(call, model, None, count))
    call.pointer(call.reads(hidden, 4 * last * model.hidden))
    call.pointer(call.reads(rows, 4 * count))
    call.number(count)
    call.pointer(call.writes(out, 4 * count * vocab, FLOAT, ROUNDED[model.dtype]))
    call.number(vocab)
    call.workspace(count)


def argmax(call: Call, x: int, rows: int, n: int, out: int, likely: int | None) -> None:
    call.pointer(call.reads(x, 4 * rows * n))
    call.number(rows)
    call.number(n)
    call.pointer(call.writes(out, 4 * rows, EXACT))
    call.pointer(call.writes(likely, 4 * rows, FLOAT, 2e-5))


def distribution(call: Call, x: int, rows: int, n: int, *columns: int) -> None:
    call.pointer(call.writes(x, 4 * rows * n, WEIGHTS, 2e-5, n))
    call.number(rows)
    call.number(n)
    for column in columns:
        call.pointer(call.reads(column, 4 * rows))


def race(
    call: Call,
    w: int,
    rows: int,
    n: int,
    seeds: int,
    indices: int,
    ids: int | None,
    count: int,
    places: int,
    scores: int,
) -> None:
    call.pointer(call.reads(w, 4 * rows * n))
    call.number(rows)
    call.number(n)
    call.pointer(call.reads(seeds, 8 * rows))
    call.pointer(call.reads(indices, 8 * rows))
    call.pointer(call.reads(ids, 4 * n))
    call.number(count)
    call.pointer(call.writes(places, 4 * rows * count, EXACT))
    call.pointer(call.writes(scores, 4 * rows * count, FLOAT, 2e-6))


DESCRIBED: tuple[Callable[..., None], ...] = (
    *(linear, store_kv, attention, forward, logits, argmax, distribution, race),
)


class Recorder:
    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._count: Counter[tuple[str, str]] = Counter()

    def around(self, name: str, function: Callable[..., Any], describe: Callable[..., None]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" ", 1)[0].split("/")[-1]
            key = name, test
            if not test or self._count[key] >= CALLS_EACH:
                return function(*arguments)
            call = Call()
            describe(call, *arguments)
            result = function(*arguments)
            if call.num_bytes <= (LARGEST_FORWARD if describe is forward else LARGEST):
                self._count[key] += 1
                self._file.write(call.serialised(name, test))
                self._file.flush()
            return result

        return called


def pytest_configure(config: pytest.Config) -> None:
    native = library.load()
    path = os.environ.get("SLIPSTREAM_RECORDING")
    if native is None or path is None:
        raise pytest.UsageError("recording takes compiled kernels, and the name of a file in SLIPSTREAM_RECORDING")
    recorder = Recorder(Path(path))
    for describe in DESCRIBED:
        name = f"slip_{describe.__name__}"
        setattr(native, name, recorder.around(name, getattr(native, name), describe))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One variant of those here does for all: the others would do the same again."""
    best = library.isa()
    items[:] = [item for item in items if _parameters(item).get("isa", best) == best]


def _parameters(item: pytest.Item) -> dict[str, Any]:
    found: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    return found
