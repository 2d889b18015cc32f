"""Where the tensors of an update of the target come from on this machine: bytes, files, folders, shared memory."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from slipstream.engine.background import breathe
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.checkpoint.json_file import read_json_object
from slipstream.engine.checkpoint.safetensors_files import find_tensors, read_header, read_tensors
from slipstream.engine.errors import ModelError
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.models.weights import Rows
from slipstream.engine.target.lora import LoraScale, scale_of

Tensors = Iterable[tuple[str, Rows]]
SHARED_MEMORY = Path("/dev/shm")
SEGMENT = re.compile(r"/?[A-Za-z0-9_.-]{1,200}")
PIECE_BYTES = 4 << 20
"""Bytes of a segment that are copied between two moments at which steps may go first."""
MOST_SHOWN = 300
"""Characters of a path that errors repeat."""
LORA_CONFIG, LORA_TENSORS = "adapter_config.json", "adapter_model.safetensors"


def unpack(tensors: bytes) -> Tensors:
    """The tensors of a safetensors file."""
    try:
        found: dict[str, Tensor] = safetensors.torch.load(tensors)
        return found.items()
    except SafetensorError as error:
        raise ModelError(f"the tensors of an update are no safetensors file: {error}") from error


def lora_scale(path: Path) -> LoraScale | None:
    """What the LoRA in a folder is scaled with; None where there is none. ModelError for one that cannot be merged."""
    config = path / LORA_CONFIG
    return scale_of(read_json_object(config), config) if _is_file(config) else None


def require_lora_scale(path: Path) -> LoraScale:
    """The same; raises ModelError where there is no LoRA, too."""
    scale = lora_scale(path)
    if scale is None:
        shown = str(path)[:MOST_SHOWN]
        raise ModelError(f"there is no LoRA: {shown!r} is no folder of a LoRA, for it has no {LORA_CONFIG}")
    return scale


def read(path: Path, model: CausalModel) -> Tensors:
    """The tensors of a safetensors file, of a LoRA's folder, of a folder of tensors, or of a whole model."""
    if path.suffix.lower() == ".safetensors":
        return read_tensors(read_header(path))
    if _is_file(path / LORA_CONFIG):
        return read_lora(path)
    if path.is_dir() and not _is_file(path / "config.json"):
        return read_tensors(find_tensors(path))
    return model.tensors(open_checkpoint(path))


def read_lora(path: Path) -> Tensors:
    """The tensors of a LoRA's folder."""
    if not _is_file(path / LORA_TENSORS) and _is_file(path / "adapter_model.bin"):
        raise ModelError(f"{path} has adapter_model.bin, which is not read; save it as {LORA_TENSORS}")
    return read_tensors(read_header(path / LORA_TENSORS))


def _is_file(path: Path) -> bool:
    """Raises ModelError where the system cannot even look: a name that is too long, a folder that may not be read, …"""
    try:
        return path.is_file()
    except OSError as error:
        raise ModelError(
            f"cannot look for {path.name} in {str(path.parent)[:MOST_SHOWN]!r}: {error.strerror}"
        ) from None


def read_segment(segment: str, num_bytes: int, first_byte: int = 0) -> bytearray:
    """A copy of some bytes of a shared-memory segment.

    A copy, and by reading: whoever shares it may cut it short at any moment, which would kill a process that has it
    mapped. Raises ModelError where there is no such segment of this user.
    """
    if not SEGMENT.fullmatch(segment):
        raise ModelError(f"{segment!r} is no name of a shared-memory segment: letters, digits and _ . - only")
    path = SHARED_MEMORY / segment.removeprefix("/")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        what = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise ModelError(f"the shared-memory segment {segment!r} cannot be opened: {what}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"{segment!r} is no shared-memory segment")
        if found.st_uid != os.geteuid():
            raise ModelError(f"the shared-memory segment {segment!r} is another user's")
        if not 0 < num_bytes <= found.st_size - first_byte:
            raise ModelError(f"the shared-memory segment {segment!r} has {found.st_size} bytes, not {num_bytes}")
        copied = bytearray(num_bytes)
        for begin, piece in _pieces(copied):
            if os.preadv(descriptor, [piece], first_byte + begin) != len(piece):
                raise ModelError(f"the shared-memory segment {segment!r} was cut short while it was read")
        return copied
    finally:
        os.close(descriptor)


def _pieces(memory: bytearray) -> Iterator[tuple[int, memoryview]]:
    view = memoryview(memory)
    for begin in range(0, len(view), PIECE_BYTES):
        breathe()
        yield begin, view[begin : begin + PIECE_BYTES]
