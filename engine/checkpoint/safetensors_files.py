"""The safetensors files of a Hugging Face folder: one file, or shards listed in an index.

Format: https://huggingface.co/docs/safetensors. The headers are checked here, so that an error can name the file and
the tensor; the data is read through the safetensors library.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipstream.engine.checkpoint.json_file import again, leads_nowhere, read_json_object
from slipstream.engine.checkpoint.stored import in_rows
from slipstream.engine.errors import ModelError
from slipstream.kernels.stored import Stored

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
COMPARED_ROWS = 256
BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "BOOL": 8, "C64": 64},
    **{"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8},
}
"""What a number of these formats takes; there are others (of less than a byte), which no model here reads."""


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    end: int
    dtype: str
    """The format's name for it: BF16, F32, I64, …"""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's weights, in the order of the files.

    Who saves a model as one file where it lay in shards deletes these, and leaves their index.
    """
    is_whole = (folder / SINGLE_FILE).is_file()
    if (folder / INDEX_FILE).is_file() and not (is_whole and _is_left_over(folder)):
        return _sharded(folder)
    if not is_whole:
        if broken := leads_nowhere(folder / SINGLE_FILE) or leads_nowhere(folder / INDEX_FILE):
            raise ModelError(f"the weights in the folder {folder} cannot be read:{broken}")
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f" It has {', '.join(others[:3])}, which is another format." if others else ""
        if named := sorted(path.name for path in folder.glob("*.safetensors")):
            hint = f" It has {', '.join(named[:3])}, which no index lists."
        raise ModelError(
            f"the folder {folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}.{hint} Download the "
            "safetensors files of the model, or convert it with transformers' save_pretrained; a .gguf file is given "
            "by its path."
        )
    return read_header(folder / SINGLE_FILE)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; ModelError if the file is damaged or truncated."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"its header should have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    ends = {name: _data_end(path, name, entry) for name, entry in header.items()}
    for name, end in ends.items():
        if 8 + length + end > size:
            raise ModelError(
                f"{path} is truncated: the data of tensor {name!r} ends at byte {8 + length + end}, the file at byte "
                f"{size}. Download the file again."
            )
    start = 8 + length
    begins = {name: start + header[name]["data_offsets"][0] for name in ends}
    names = sorted(ends, key=lambda name: (begins[name], ends[name]))
    for one, other in pairwise(names):
        if begins[other] < start + ends[one]:
            raise _damaged(path, f"the tensors {one!r} and {other!r} lie in the same bytes")
    return {
        name: StoredTensor(path, tuple(entry["shape"]), begins[name], start + ends[name], entry["dtype"])
        for name in names
        for entry in (header[name],)
    }


def read_tensors(tensors: dict[str, StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs, one at a time; a tensor shares the memory map of its file."""
    by_file: dict[Path, list[str]] = {}
    for name, stored in tensors.items():
        by_file.setdefault(stored.file, []).append(name)
    for path, names in by_file.items():
        yield from _read_file(path, names)


def read_stored(tensor: StoredTensor) -> Stored:
    """A tensor as it lies in the file."""
    try:
        with tensor.file.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {tensor.file}: {error}") from error
    return in_rows(tensor.dtype, tensor.shape, memoryview(data)[tensor.begin : tensor.end])


def are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same numbers in the same format."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    left, right = read_stored(one).data, read_stored(other).data
    return all(
        left[row : row + COMPARED_ROWS].tobytes() == right[row : row + COMPARED_ROWS].tobytes()
        for row in range(0, len(left), COMPARED_ROWS)
    )


def _read_file(path: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _weight_map(folder: Path) -> dict[str, Any]:
    index = folder / INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map, which lists the file of every tensor. Download the file again.")
    return weight_map


def _is_left_over(folder: Path) -> bool:
    """Whether none of the shards is there that the index lists."""
    return not any((folder / str(shard)).is_file() for shard in _weight_map(folder).values())


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    index, weight_map = folder / INDEX_FILE, _weight_map(folder)
    found: dict[str, StoredTensor] = {}
    for shard in dict.fromkeys(map(str, weight_map.values())):
        path = folder / shard
        if Path(shard).name != shard or not path.is_file():
            count = sum(value == shard for value in weight_map.values())
            raise ModelError(
                f"the shard {shard!r} with {count} tensors is listed in {index} but is not in the folder. Download it."
            )
        found |= read_header(path)
    for name, shard in weight_map.items():
        if name not in found or found[name].file.name != shard:
            raise ModelError(f"{folder / str(shard)} lacks the tensor {name!r} that {index} lists. Download it again.")
    return found


def _data_end(path: Path, name: str, entry: Any) -> int:
    """Where the tensor's data ends, in bytes after the header."""
    try:
        begin, end = entry["data_offsets"]
        numbers = [begin, end, *entry["shape"]]
        entry["dtype"].isascii()
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise _damaged(path, f"the header entry of tensor {name!r} is malformed") from error
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or end < begin:
        raise _damaged(path, f"the header entry of tensor {name!r} is malformed")
    bits = BITS.get(entry["dtype"])
    if bits is not None and math.prod(entry["shape"]) * bits != (end - begin) * 8:
        shape = str(entry["shape"])[:60]
        raise _damaged(
            path, f"tensor {name!r} has {end - begin} bytes, which are not {shape} numbers of {entry['dtype']}"
        )
    return int(end)


def _damaged(path: Path, problem: str) -> ModelError:
    return ModelError(f"{path} is not a valid safetensors file: {problem}. {again(path)}")
