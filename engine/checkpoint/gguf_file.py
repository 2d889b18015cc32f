"""Reads GGUF files: metadata, tensor table and dequantised tensors. A model may lie in several, its parts.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The header is
parsed over a memory map, because gguf.GGUFReader makes numpy views of every string of the vocabulary (2 s and
170 MB for a vocabulary of 49152). Nothing read from the file is trusted: every length is checked against what is left.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipstream.engine.checkpoint.json_file import again
from slipstream.engine.checkpoint.stored import in_rows
from slipstream.engine.errors import ModelError
from slipstream.kernels.stored import Stored

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

LENGTH = struct.Struct("<Q")
# Metadata value types with a fixed size, as struct codes; the others are strings and arrays.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING = 8
ARRAY = 9

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
"""Name of a file that holds one of several parts of a model; the first is number 1."""
MOST_PARTS = 1000

FLOATS = {"F32": "<f4", "F16": "<f2"}
"""As numpy calls them."""
CHUNK_ELEMENTS = 1 << 17
"""Weights dequantised at once: large enough to hide the interpreter, small enough that buffers are reused."""


@dataclass(frozen=True)
class TensorType:
    name: str
    block_elements: int
    block_bytes: int


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
}


@dataclass(frozen=True)
class TensorInfo:
    name: str
    type: TensorType
    shape: tuple[int, ...]
    """Row-major: the last dimension is contiguous (the file stores the dimensions the other way round)."""
    offset: int
    """First byte, from the start of the file."""
    num_bytes: int


class Metadata(Mapping[str, Any]):
    """Keys and Python values, arrays as lists, which are read when they are asked for: most of a header is the
    vocabulary, which only a tokenizer needs, and as Python objects it takes 10 MB and more.

    ``[]`` raises ModelError where texts of an array are not UTF-8.
    """

    def __init__(self, values: dict[str, Any], cursor: _Cursor) -> None:
        """``values``: arrays as ``_Array``."""
        self._values = values
        self._cursor = cursor

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        return self._cursor.array(key, value) if isinstance(value, _Array) else value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True, slots=True)
class _Array:
    """One that fits into the file, unread."""

    kind: int
    """What its values are."""
    count: int
    offset: int


class GGUFFile:
    """A parsed GGUF file, with the parts that follow it if it is the first of several."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        whole = _Parsed(self.path)
        self.metadata, self.tensors = whole.metadata, whole.tensors
        self._data = dict.fromkeys(self.tensors, whole.data)
        """The file that a tensor lies in, by its name."""
        for number, part in enumerate(parts_of(self.path, whole.metadata)[1:], 1):
            self._add(_Parsed(part), number)

    def _add(self, part: _Parsed, number: int) -> None:
        """A part, the first of which is number 0."""
        stated = {"split.no": number, "split.count": self.metadata["split.count"]}
        if any(part.metadata.get(key) != value for key, value in stated.items()) or part.tensors.keys() & self.tensors:
            raise ModelError(
                f"{part.path} is not part {number + 1} of the model that {self.path} begins. Download both again."
            )
        self.tensors |= part.tensors
        self._data |= dict.fromkeys(part.tensors, part.data)

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """The named tensor dequantised to float32, as a fresh array."""
        return dequantised(self.stored(name))

    def stored(self, name: str) -> Stored:
        """The named tensor as it lies in the file; raises ModelError if there is none."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.path} has no tensor {name!r}")
        data = memoryview(self._data[name])[info.offset : info.offset + info.num_bytes]
        return in_rows(info.type.name, info.shape, data)


class _Parsed:
    """One file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelError(f"cannot read the GGUF file {path}: {error}") from error
        cursor = _Cursor(self.data, path)
        try:
            num_tensors, num_entries = cursor.preamble()
            self.metadata = Metadata(cursor.metadata(num_entries), cursor)
            self.tensors = cursor.tensor_table(num_tensors, self.metadata)
        except UnicodeDecodeError as error:
            raise cursor.broken("a string is not UTF-8") from error


def parts_of(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """The files of a model that this one begins, which is the only one in most cases.

    Raises ModelError where it does not begin it, or another one is not there.
    """
    count = metadata.get("split.count")
    if count in (None, 0, 1):  # 0 where parts were joined
        return [path]
    found = PART.fullmatch(path.name)
    if not isinstance(count, int) or not 1 < count <= MOST_PARTS or found is None or int(found["count"]) != count:
        raise ModelError(
            f"{path} is one of {str(count)[:8]} parts, and not called as such are (NAME-00001-of-00003.gguf). Give "
            "them the names that they were published with, or join them: `llama-gguf-split --merge FIRST WHOLE.gguf`"
        )
    parts = part_names(path.name)
    if path.name != parts[0] or metadata.get("split.no") != 0:
        raise ModelError(f"{path} is not the first of its {count} parts; give {path.with_name(parts[0])}")
    if missing := [name for name in parts if not path.with_name(name).is_file()]:
        raise ModelError(
            f"{path} is one of {count} parts, of which {len(missing)} are not beside it, for example {missing[0]}. "
            "Download them into the same folder."
        )
    return [path.with_name(name) for name in parts]


def part_names(name: str) -> list[str]:
    """Names of all parts of a model of which one file is called so; the name alone where it is none of a part."""
    found = PART.fullmatch(name)
    if found is None or not 1 <= int(found["count"]) <= MOST_PARTS:
        return [name]
    end = name[found.end("number") :]
    return [f"{found['stem']}-{number:05d}{end}" for number in range(1, int(found["count"]) + 1)]


def dequantised(stored: Stored) -> npt.NDArray[np.float32]:
    """A tensor of one of TENSOR_TYPES in float32, as a fresh array."""
    import numpy as np

    if stored.format in FLOATS:
        return stored.data.view(FLOATS[stored.format]).astype(np.float32).reshape(stored.shape)
    import gguf  # not needed for norms, which is all that packed weights have besides blocks

    [kind] = (each for each in TENSOR_TYPES.values() if each.name == stored.format)
    packed = stored.data.reshape(-1, kind.block_bytes)  # [num_blocks, block_bytes]
    out = np.empty((len(packed), kind.block_elements), np.float32)
    step = max(1, CHUNK_ELEMENTS // kind.block_elements)
    with np.errstate(all="ignore"):  # a scale may be infinite or NaN in a damaged file
        for start in range(0, len(packed), step):
            chunk = packed[start : start + step]
            # One long row: the library works through rows in small groups, in the interpreter.
            flat = gguf.quants.dequantize(chunk.reshape(1, -1), gguf.GGMLQuantizationType[kind.name])
            out[start : start + step] = flat.reshape(len(chunk), -1)
    return out.reshape(stored.shape)


class _Cursor:
    """A position in the header that never moves past the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.size = len(data)
        self.offset = 0
        self.reading = "the header"

    def broken(self, problem: str) -> ModelError:
        return ModelError(
            f"{self.path} is not a valid GGUF file: {problem} ({self.reading}, byte {self.offset} of {self.size}). "
            f"{again(self.path)}"
        )

    def unpack(self, code: str) -> tuple[Any, ...]:
        layout = "<" + code
        end = self.offset + struct.calcsize(layout)
        if end > self.size:
            raise self.broken("it ends in the middle of the header")
        values = struct.unpack_from(layout, self.data, self.offset)
        self.offset = end
        return values

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > self.size - self.offset:
            raise self.broken(f"it states {count} {what}, more than fit in the rest of the file")

    def string(self) -> str:
        start = self.offset + 8
        self.skip_strings(1)
        return str(self.data[start : self.offset], "utf-8")

    def skip_strings(self, count: int) -> None:
        """Moves past them; raises ModelError if they do not fit into the file."""
        self.check_count(count, 8, "strings")
        read_length = LENGTH.unpack_from
        data, size, offset = self.data, self.size, self.offset
        for _ in range(count):
            start = offset + 8
            if start > size:
                raise self.broken("it ends in the middle of the header")
            end = start + read_length(data, offset)[0]
            if end > size:
                self.offset = offset
                raise self.broken(f"a string of {end - start} bytes reaches past the end of the file")
            offset = end
        self.offset = offset

    def array(self, key: str, array: _Array) -> list[Any]:
        """The values of one that ``value`` found; ModelError if they are texts that are not UTF-8."""
        data, start = self.data, array.offset
        if array.kind != STRING:
            return list(struct.unpack_from(f"<{array.count}{SCALARS[array.kind]}", data, start))
        values = []
        try:
            for _ in range(array.count):
                begin = start + 8
                start = begin + LENGTH.unpack_from(data, start)[0]
                values.append(str(data[begin:start], "utf-8"))
        except UnicodeDecodeError as error:
            self.reading, self.offset = f"metadata {key!r}", begin
            raise self.broken("a string is not UTF-8") from error
        return values

    def preamble(self) -> tuple[int, int]:
        """The numbers of tensors and of metadata entries."""
        magic = self.data[:4]
        if magic != MAGIC:
            raise self.broken(f"it begins with {magic!r} instead of {MAGIC!r}")
        self.offset = 4
        (version,) = self.unpack("I")
        if version not in VERSIONS:
            if version and version & 0xFFFF == 0:
                raise self.broken("it is big-endian, which is not supported")
            raise self.broken(f"version {version} is not supported, versions {VERSIONS[0]} and {VERSIONS[1]} are")
        num_tensors, num_entries = self.unpack("QQ")
        self.check_count(num_tensors, 24, "tensors")
        self.check_count(num_entries, 13, "metadata entries")
        return num_tensors, num_entries

    def metadata(self, count: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for index in range(count):
            self.reading = f"metadata entry {index}"
            key = self.string()
            if key in entries:
                raise self.broken(f"the metadata key {key!r} occurs twice")
            self.reading = f"metadata {key!r}"
            entries[key] = self.value(self.unpack("I")[0])
        return entries

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.unpack(SCALARS[kind])[0]
        if kind != ARRAY:
            raise self.broken(f"unknown value type {kind}")
        element, count = self.unpack("IQ")
        found = _Array(element, count, self.offset)
        if element == STRING:
            self.skip_strings(count)
        elif element not in SCALARS:
            raise self.broken(f"arrays of value type {element} are not supported")
        else:
            size = struct.calcsize("<" + SCALARS[element])
            self.check_count(count, size, "numbers")
            self.offset += count * size
        return found

    def tensor_table(self, count: int, metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self.broken(f"general.alignment is {alignment!r}, not a power of two")
        found: list[tuple[str, TensorType, tuple[int, ...], int]] = []
        names = set()
        for index in range(count):
            self.reading = f"tensor {index}"
            name = self.string()
            self.reading = f"tensor {name!r}"
            if name in names:
                raise self.broken("two tensors have this name")
            names.add(name)
            (num_dimensions,) = self.unpack("I")
            if not 1 <= num_dimensions <= MAX_DIMENSIONS:
                raise self.broken(f"it has {num_dimensions} dimensions, 1 to {MAX_DIMENSIONS} are possible")
            shape = tuple(reversed(self.unpack(f"{num_dimensions}Q")))
            kind, offset = self.unpack("IQ")
            if kind not in TENSOR_TYPES:
                supported = ", ".join(each.name for each in TENSOR_TYPES.values())
                raise ModelError(
                    f"{self.path}: tensor {name!r} has type {kind}, which cannot be read. Supported types are "
                    f"{supported}; choose a file of one of these, for example Q4_K_M or Q8_0."
                )
            if 0 in shape or shape[-1] % TENSOR_TYPES[kind].block_elements:
                raise self.broken(f"shape {list(shape)} does not fit type {TENSOR_TYPES[kind].name}")
            if offset % alignment:
                raise self.broken(f"its data offset {offset} is not a multiple of {alignment}")
            found.append((name, TENSOR_TYPES[kind], shape, offset))
        data_start = -(-self.offset // alignment) * alignment
        placed = {name: self.placed(name, kind, shape, data_start + offset) for name, kind, shape, offset in found}
        end, before = 0, ""
        for info in sorted(placed.values(), key=lambda info: info.offset):
            if info.offset < end:
                raise self.broken(f"the tensors {before!r} and {info.name!r} lie in the same bytes")
            end, before = info.offset + info.num_bytes, info.name
        return placed

    def placed(self, name: str, kind: TensorType, shape: tuple[int, ...], offset: int) -> TensorInfo:
        num_bytes = math.prod(shape) // kind.block_elements * kind.block_bytes
        if offset + num_bytes > self.size:
            raise ModelError(
                f"{self.path} is truncated: the data of tensor {name!r} ends at byte {offset + num_bytes}, the file at "
                f"byte {self.size}. Download the file again."
            )
        return TensorInfo(name, kind, shape, offset, num_bytes)
