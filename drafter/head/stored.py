"""Heads as safetensors files, checked and converted without torch: to load that takes longer than all else here does.

Numbers of 16 bits in bfloat16, for which numpy has no type, are the upper halves of those of float32.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.drafter.head.config import NO_WHOLE_NUMBERS, HeadConfig, check_shapes, find_weights
from slipstream.engine.checkpoint.safetensors_files import StoredTensor, read_header
from slipstream.engine.errors import ModelError

Array = NDArray[Any]
PIECE = 1 << 20
"""Numbers converted at a time: large heads need little memory beside them."""
TYPES: Mapping[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    numbers: Array
    """Flat; bfloat16 as its bits."""

    def pieces(self) -> Iterator[Array]:
        """The values of floating numbers in float32, of others as they are."""
        for start in range(0, max(len(self.numbers), 1), PIECE):
            part = self.numbers[start : start + PIECE]
            if self.dtype == "BF16":
                yield (part.astype(np.uint32) << 16).view(np.float32)
            else:
                yield part.astype(np.float32) if self.dtype in FLOATING else part


def read(path: Path) -> dict[str, Stored]:
    """The tensors of a file, over a map of it; raises ModelError if it is damaged."""
    return _mapped(read_header(path))


def read_published(folder: Path) -> dict[str, Stored]:
    """The tensors of a published head; raises ModelError as ``find_weights`` does."""
    return _mapped(find_weights(folder))


def _mapped(header: Mapping[str, StoredTensor]) -> dict[str, Stored]:
    files: dict[Path, memoryview] = {}
    for path in dict.fromkeys(entry.file for entry in header.values()):
        try:
            with path.open("rb") as file:
                files[path] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path}: {error}") from error
    return {name: _tensor(name, entry, files[entry.file]) for name, entry in header.items()}


def _tensor(name: str, entry: StoredTensor, data: memoryview) -> Stored:
    path = entry.file
    if entry.dtype not in TYPES:
        raise ModelError(f"the tensor {name!r} in {path} is of type {entry.dtype}; supported are {', '.join(TYPES)}")
    return Stored(entry.dtype, entry.shape, np.frombuffer(data[entry.begin : entry.end], TYPES[entry.dtype]))


def check(config: HeadConfig, tensors: Mapping[str, Stored]) -> None:
    """Raises ModelError where tensors are not what the configuration says, or hold no numbers, as layout.check does."""
    check_shapes(config, {name: tensor.shape for name, tensor in tensors.items()})
    if "d2t" in tensors:
        if tensors["d2t"].dtype in FLOATING:
            raise ModelError(NO_WHOLE_NUMBERS)
        tokens = tensors["d2t"].numbers.astype(np.int64) + np.arange(config.draft_vocab_size)
        if tokens.min() < 0 or tokens.max() >= config.vocab_size:
            raise ModelError("the drafter's 'd2t' maps to tokens outside the vocabulary")
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATING and not all(np.isfinite(part).all() for part in tensor.pieces()):
            raise ModelError(f"the drafter's {name!r} holds numbers that are not finite")


def published(config: HeadConfig, tensors: Mapping[str, Stored]) -> bytes:
    """The file in which this project publishes a head: what the head has, floating numbers in bfloat16."""
    kept = {name: _published(tensors[name]) for name in config.shapes if name in tensors}
    if "d2t" in kept:  # in one form, whatever others have, and with a mask that says the same
        offsets, is_drafted = kept["d2t"].numbers.astype("<i8"), np.zeros(config.vocab_size, np.bool_)
        is_drafted[offsets + np.arange(config.draft_vocab_size)] = True
        kept |= {"d2t": Stored("I64", offsets.shape, offsets), "t2d": Stored("BOOL", is_drafted.shape, is_drafted)}
    # As the safetensors library writes it: the largest numbers first, so that each is aligned, in the order of names.
    order = sorted(kept, key=lambda name: (-kept[name].numbers.itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = kept[name]
        begin, end = end, end + tensor.numbers.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *(kept[name].numbers.tobytes() for name in order)))


def _published(tensor: Stored) -> Stored:
    if tensor.dtype not in FLOATING or tensor.dtype == "BF16":
        return tensor
    rounded = np.concatenate([_round(part) for part in tensor.pieces()])
    return Stored("BF16", tensor.shape, rounded)


def _round(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Finite numbers to the nearest in bfloat16, to the even one of two."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def change(before: Stored, after: Stored) -> float | None:
    """How far a tensor moved, |after - before| / |before| (Frobenius norm); None where that has no meaning."""
    if before.shape != after.shape:
        return None
    moved = size = 0.0
    for old, new in zip(before.pieces(), after.pieces(), strict=True):
        wide = old.astype(np.float64)
        moved += float(np.square(new.astype(np.float64) - wide).sum())
        size += float(np.square(wide).sum())
    return math.sqrt(moved / size) if size else (0.0 if moved == 0 else None)
