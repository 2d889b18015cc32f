"""A matrix that several tensors of a file hold together: whole numbers by groups, or small floats, and their scales.

Nothing is read before it is asked for, and torch is not imported either: configurations are also read where there is
no need of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from slipstream.engine.checkpoint.safetensors_files import StoredTensor, read_stored
from slipstream.engine.errors import ModelError
from slipstream.kernels.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
NUMBERS = "F32"
TYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"},
    **{"F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16"},
    **{"I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
"""torch's names of formats by those of safetensors files."""
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors of a linear layer that its matrix is made of, by the last part of their names."""

    name: str
    parts: Mapping[str, StoredTensor]

    def need(self, part: str, *kinds: str) -> StoredTensor:
        """The tensor of this name; ModelError where there is none, or one of another format than these, if any."""
        found = self.parts.get(part)
        if found is None:
            raise ModelError(f"the checkpoint lacks {self.full(part)}, which {self.full(next(iter(self.parts)))} needs")
        if kinds and found.dtype not in kinds:
            raise ModelError(f"{self.full(part)} has the format {found.dtype}, {' or '.join(kinds)} is needed")
        return found

    def misfit(self, part: str) -> ModelError:
        shape = list(self.parts[part].shape)
        return ModelError(f"{self.full(part)} has shape {shape}, which does not fit the module's other tensors")

    def full(self, part: str) -> str:
        """The name of a tensor, for people."""
        return repr(f"{self.name}.{part}")

    def tensor(self, part: str) -> Tensor:
        """A copy of what the file holds."""
        import torch

        found = self.parts[part]
        return self.bytes(part).reshape(-1).view(getattr(torch, TYPES[found.dtype])).reshape(found.shape)

    def bytes(self, part: str) -> Tensor:
        """[rows, bytes of a row]"""
        import torch

        return torch.from_numpy(read_stored(self.parts[part]).data.copy())

    def whole(self, part: str) -> list[int]:
        """A few whole numbers of 32 or 64 bits."""
        found = self.parts[part]
        return memoryview(read_stored(found).data.tobytes()).cast("q" if found.dtype == "I64" else "i").tolist()

    def scales(self, part: str) -> Tensor:
        """In float32; ModelError where they are not finite."""
        scales = self.tensor(part).float()
        if not bool(scales.isfinite().all()):
            raise ModelError(f"{self.full(part)} has numbers that are not finite (NaN or infinite)")
        return scales


class Matrix(ABC):
    """[n, k] numbers."""

    shape: tuple[int, int]

    @property
    @abstractmethod
    def format(self) -> str:
        """What ``stored`` has: blocks of a type that kernels take, or numbers."""

    @abstractmethod
    def numbers(self) -> Tensor:
        """[n, k] in float32."""

    def stored(self) -> Stored:
        import torch

        return Stored(NUMBERS, self.shape, self.numbers().contiguous().view(torch.uint8).numpy())


@dataclass(frozen=True, eq=False)
class Numbers(Matrix):
    """Which are not kept in few bits."""

    shape: tuple[int, int]
    read: Callable[[], Tensor]

    @property
    def format(self) -> str:
        return NUMBERS

    def numbers(self) -> Tensor:
        return self.read()


@dataclass(frozen=True)
class Whole:
    """How whole numbers of a matrix [n, k] are read: a number is scale * (q - zero), with those of its group."""

    q: Callable[[], Tensor]
    """[n, k] uint8: 0 … 2^bits - 1."""
    scale: Callable[[], Tensor]
    """[n, groups] float32."""
    zero: Callable[[], Tensor | None]
    """[n, groups] whole numbers; None where all are 2^(bits - 1)."""
    group: Callable[[], Tensor] | int
    """[k]: the group of every input, or how many inputs a group has that follow each other."""


class Grouped(Matrix):
    """Whole numbers of 4 or 8 bits with a scale, and maybe a zero, for every group of inputs.

    It is kept as blocks of 32 inputs where they say the same: inputs of a block are of one group, and its scale is a
    float16. Otherwise as numbers.
    """

    def __init__(self, shape: tuple[int, int], bits: int, parts: Whole) -> None:
        self.shape, self._bits, self._parts = shape, bits, parts

    @cached_property
    def format(self) -> str:
        import torch

        k, scale = self.shape[1], self._parts.scale()
        if k % BLOCK or not torch.equal(scale.half().float(), scale):
            return NUMBERS
        blocks = self._groups().view(-1, BLOCK)
        if not torch.equal(blocks, blocks[:, :1].expand_as(blocks)):
            return NUMBERS
        return f"INT{self._bits}" + ("" if self._zero is None else "_ZERO")

    @property
    def _zero(self) -> Tensor | None:
        return self._parts.zero()

    def _groups(self) -> Tensor:
        import torch

        group = self._parts.group
        return torch.arange(self.shape[1]) // group if isinstance(group, int) else group()

    def numbers(self) -> Tensor:
        import torch

        groups, zero = self._groups(), self._zero
        numbers = self._parts.q().float()
        numbers -= 1 << (self._bits - 1) if zero is None else torch.index_select(zero.float(), 1, groups)
        return numbers.mul_(torch.index_select(self._parts.scale(), 1, groups))

    def stored(self) -> Stored:
        import torch

        if self.format == NUMBERS:
            return super().stored()
        n = self.shape[0]
        groups, q, zero = self._groups()[::BLOCK], self._parts.q(), self._zero
        sides = [torch.index_select(self._parts.scale(), 1, groups)]
        if zero is not None:  # numbers of 8 bits have signs in blocks
            sides.append(torch.index_select(zero, 1, groups).float() - (128 if self._bits == 8 else 0))
        parts = [side.half().view(n, -1, 1).view(torch.uint8) for side in sides]
        if self._bits == 4:
            halves = q.reshape(n, -1, 2, BLOCK // 2)
            parts.append(halves[:, :, 0] | halves[:, :, 1] << 4)
        else:
            parts.append((q ^ 0x80).reshape(n, -1, BLOCK))
        return Stored(self.format, self.shape, torch.cat(parts, dim=-1).view(n, -1).numpy())


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Words [rows, columns] of 32 bits -> [rows, columns * 32 / bits] uint8, the lowest bits first."""
    import torch

    count = 32 // bits
    out = torch.empty(*words.shape, count, dtype=torch.uint8)
    for i in range(count):
        out[:, :, i] = words >> (bits * i) & ((1 << bits) - 1)
    return out.view(len(words), -1)


def words_of(module: Module, per_word: int) -> tuple[StoredTensor, int, int, StoredTensor]:
    """``qweight`` [any, n / per_word], n, the number of groups, and ``qzeros``, as GPTQ and AWQ have them, beside
    ``scales`` [groups, n]; ModelError where words and scales do not fit each other."""
    words, scales, zeros = module.need("qweight", "I32"), module.need("scales", *FLOATS), module.need("qzeros", "I32")
    if len(words.shape) != 2 or 0 in words.shape:
        raise module.misfit("qweight")
    n = words.shape[1] * per_word
    if len(scales.shape) != 2 or scales.shape[1] != n:
        raise module.misfit("scales")
    return words, n, scales.shape[0], zeros


def group_size(module: Module, part: str, stated: int, k: int, groups: int) -> int:
    """Inputs of a group, where ``part`` has one number for each of so many groups: as stated, or as many as groups of
    one size have, since modules may have another size than the model's; ModelError if they do not fit."""
    size = k if stated <= 0 else stated
    if -(-k // size) == groups:
        return size
    if not groups or k % groups:
        raise module.misfit(part)
    return k // groups


def groups_of_inputs(module: Module, part: str, k: int, groups: int) -> Callable[[], Tensor]:
    """What reads the group of every input; ModelError for another number of inputs, or groups that there are not."""
    if module.need(part, "I32", "I64").shape != (k,):
        raise module.misfit(part)

    def read() -> Tensor:
        import torch

        found = module.tensor(part).long()
        if bool((found == -1).all()) and k % groups == 0:  # compressed-tensors says so that they are in order
            return torch.arange(k) // (k // groups)
        if not bool(((found >= 0) & (found < groups)).all()):
            raise ModelError(f"{module.full(part)} names groups that there are not; there are {groups}")
        return found

    return read
