"""GPTQ: ``qweight`` [k * bits / 32, n] words along the inputs, ``qzeros`` [groups, n * bits / 32] along the outputs,
``scales`` [groups, n], and ``g_idx`` [k], the group of every input, where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slipstream.engine.checkpoint.quantised.matrix import (
    Grouped,
    Matrix,
    Module,
    Whole,
    group_size,
    groups_of_inputs,
    unpacked,
    words_of,
)
from slipstream.engine.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

BITS = (4, 8)


@dataclass(frozen=True)
class GPTQ:
    """Bits and which modules are quantised are seen from the tensors, as rules for single modules vary them, too."""

    group_size: int
    """-1 for one group; a module's ``g_idx`` goes first."""
    is_symmetric: bool
    less_one: bool
    """Whether zeros are stored less one, as in all but the second version of the format."""
    in_order: bool
    """Whether groups are of inputs that follow each other, where no ``g_idx`` says otherwise."""
    parts: str = r"(.+)\.(qweight|qzeros|scales|g_idx)"

    def matrix(self, module: Module) -> Matrix:
        words, n, groups, zeros = words_of(module, per_word=1)
        if len(zeros.shape) != 2 or zeros.shape[0] != groups or zeros.shape[1] * 32 % n:
            raise module.misfit("qzeros")
        bits = zeros.shape[1] * 32 // n
        if bits not in BITS:
            raise ModelError(
                f"{module.full('qweight')} has numbers of {bits} bits; of GPTQ those of 4 and 8 bits can be read: "
                "serve such a version of the model, its bfloat16 weights, or a GGUF file of it"
            )
        k = words.shape[0] * 32 // bits
        parts = Whole(
            lambda: unpacked(module.tensor("qweight").t().contiguous(), bits),
            lambda: module.scales("scales").t().contiguous(),
            lambda: self._zeros(module, bits),
            self._groups(module, k, groups),
        )
        return Grouped((n, k), bits, parts)

    def _zeros(self, module: Module, bits: int) -> Tensor | None:
        words, centre = module.tensor("qzeros"), 1 << (bits - 1)
        if self.is_symmetric and any(bool((words == _all(zero, bits)).all()) for zero in (centre, centre - 1)):
            return None  # whatever the version is said to be
        if self.less_one:  # taken from whole words, so a zero of 0 has borrowed from the next one
            words = words + _all(1, bits)
        return unpacked(words, bits).t().contiguous()

    def _groups(self, module: Module, k: int, groups: int) -> Callable[[], Tensor] | int:
        if (stored := module.parts.get("g_idx")) is not None and stored.num_elements:
            return groups_of_inputs(module, "g_idx", k, groups)
        if not self.in_order:
            raise ModelError(f"the checkpoint lacks {module.full('g_idx')}, which desc_act needs")
        return group_size(module, "scales", self.group_size, k, groups)


def _all(number: int, bits: int) -> int:
    """A word of 32 bits, with a sign, that has this number everywhere."""
    word = sum(number << at for at in range(0, 32, bits))
    return word - (1 << 32) if word >> 31 else word
