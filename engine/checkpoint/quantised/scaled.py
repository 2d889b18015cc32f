"""Weights of a byte each, floats or whole numbers, in tensors that are called as others are, with scales beside them:
one for all, one for each output, for groups of inputs, or for blocks of outputs and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slipstream.engine.checkpoint.quantised.matrix import (
    FLOATS,
    Grouped,
    Matrix,
    Module,
    Numbers,
    Whole,
    groups_of_inputs,
    unpacked,
)
from slipstream.engine.checkpoint.safetensors_files import read_stored
from slipstream.engine.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = (*FLOATS, "F8_E8M0")
SCALE_PARTS = {"weight_scale", "weight_scale_inv"}
AGAIN = "Convert the model again, or serve its bfloat16 weights"
PACKED, ZERO, ORDER = "weight_packed", "weight_zero_point", "weight_g_idx"


@dataclass(frozen=True)
class Scaled:
    """FP8 of all exporters (``weight_scale``, or ``weight_scale_inv``, which is no other thing), and what
    compressed-tensors makes: bytes, and words of several numbers (``weight_packed``)."""

    block: tuple[int, int]
    """Outputs and inputs that share a scale, where a matrix has one for blocks of both."""
    has_zeros: bool = False
    """Whether whole numbers have zeros, where all do."""
    parts: str = r"(.+)\.(weight|weight_(?:packed|scale|scale_inv|zero_point|shape|g_idx))"

    def matrix(self, module: Module) -> Matrix | None:
        if PACKED in module.parts:
            return self._packed(module)
        weight = module.need("weight")
        if weight.dtype not in (*FP8, "I8"):
            if weight.dtype in FLOATS and (beside := sorted(SCALE_PARTS.intersection(module.parts))):
                raise ModelError(
                    f"{module.full('weight')} has the format {weight.dtype}, with {module.full(beside[0])} beside it: "
                    "the model was saved before its weights were quantised. Save it compressed, or serve its bfloat16 "
                    "weights"
                )
            return None
        if len(weight.shape) != 2 or 0 in weight.shape:
            raise module.misfit("weight")
        part = "weight_scale_inv" if "weight_scale_inv" in module.parts else "weight_scale"
        scales = module.need(part, *SCALES)
        n, k = weight.shape
        if weight.dtype == "I8":
            return self._whole(module, (n, k), 8, lambda: module.bytes("weight") ^ 0x80)
        sizes = scales.shape
        if (zeros := module.parts.get(ZERO)) is not None and read_stored(zeros).data.any():
            raise ModelError(f"{module.full(ZERO)} is not 0, which FP8 weights have no use for. {AGAIN}")
        blocks = (-(-n // self.block[0]), -(-k // self.block[1]))
        # The sizes of blocks go first: a small matrix may be one block.
        if sizes == blocks:
            return Numbers((n, k), lambda: _by_blocks(module.tensor("weight"), module.scales(part), self.block))
        groups = _groups(module, part, n, k)

        def by_groups() -> Tensor:
            numbers = module.tensor("weight").float().view(n, groups, -1)
            return numbers.mul_(module.scales(part).view(-1, groups, 1)).view(n, k)

        return Numbers((n, k), by_groups)

    def _packed(self, module: Module) -> Matrix:
        words, shape = module.need(PACKED, "I32"), module.need("weight_shape", "I64", "I32")
        if len(words.shape) != 2 or shape.shape != (2,):
            raise module.misfit(PACKED)
        n, k = map(int, module.whole("weight_shape"))
        found = [bits for bits in (4, 8) if words.shape == (n, -(-k * bits // 32))]
        if not found or n <= 0 or k <= 0:
            raise ModelError(
                f"{module.full(PACKED)} has shape {list(words.shape)}, which is not that of {n} by {k} numbers of 4 or "
                "8 bits"
            )
        return self._whole(module, (n, k), found[0], lambda: unpacked(module.tensor(PACKED), found[0])[:, :k])

    def _whole(self, module: Module, shape: tuple[int, int], bits: int, q: Callable[[], Tensor]) -> Matrix:
        n, k = shape
        sizes, groups = module.need("weight_scale", *FLOATS).shape, _groups(module, "weight_scale", n, k)
        zeros = module.need(ZERO) if self.has_zeros else module.parts.get(ZERO)
        words = zeros is not None and module.need(ZERO, "I8", "I32").dtype == "I32"
        if zeros is not None and zeros.shape != ((-(-n * bits // 32), groups) if words else sizes):
            raise module.misfit(ZERO)

        def zero() -> Tensor | None:
            if zeros is None:
                return None
            found = module.tensor(ZERO)
            if words:
                return unpacked(found.t().contiguous(), bits)[:, :n].t().contiguous().int()
            # Stored with a sign, as a number of so many bits.
            return (found.int() + (1 << (bits - 1))).reshape(-1, groups).expand(n, groups)

        inputs = groups_of_inputs(module, ORDER, k, groups) if ORDER in module.parts else k // groups

        def scale() -> Tensor:
            return module.scales("weight_scale").reshape(-1, groups).expand(n, groups)

        return Grouped(shape, bits, Whole(q, scale, zero, inputs))


def _groups(module: Module, part: str, n: int, k: int) -> int:
    """How many groups of inputs have a scale each: of all outputs or of each. ModelError for other shapes."""
    sizes = module.parts[part].shape
    groups = sizes[1] if len(sizes) == 2 else 1
    if not groups or k % groups or not (sizes in ((), (1,), (n,)) or (len(sizes) == 2 and sizes[0] in (1, n))):
        raise module.misfit(part)
    return groups


def _by_blocks(numbers: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    wide = scales.repeat_interleave(min(block[1], numbers.shape[1]), 1)[:, : numbers.shape[1]]
    found = numbers.float()
    for at in range(len(scales)):
        found[at * block[0] : (at + 1) * block[0]] *= wide[at]
    return found
