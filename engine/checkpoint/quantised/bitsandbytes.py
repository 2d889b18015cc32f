"""bitsandbytes: 4-bit numbers that stand for those of a table, and whole numbers of 8 bits with a scale for a row."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slipstream.engine.checkpoint.quantised.matrix import Matrix, Module, Numbers
from slipstream.engine.checkpoint.safetensors_files import read_stored
from slipstream.engine.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

STATE = "weight.quant_state.bitsandbytes__"
HALF, SCALES = "weight.absmax", "SCB"
ONE_127TH = 7.874015718698502e-3
"""As bitsandbytes has it."""


@dataclass(frozen=True)
class BitsAndBytes:
    parts: str = (
        r"(.+)\.(weight(?:\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+))?"
        r"|SCB|weight_format)"
    )

    def matrix(self, module: Module) -> Matrix | None:
        if states := [part for part in module.parts if part.startswith(STATE)]:
            return _four_bits(module, states[0])
        if SCALES not in module.parts:
            return None
        weight = module.need("weight", "I8")
        if len(weight.shape) != 2 or module.need(SCALES, "F32").shape != weight.shape[:1]:
            raise module.misfit(SCALES)
        n, k = weight.shape
        rows = lambda: module.tensor("weight").float().mul_(module.scales(SCALES)[:, None]).mul_(ONE_127TH)  # noqa: E731
        return Numbers((n, k), rows)


def _four_bits(module: Module, part: str) -> Matrix:
    try:
        state = json.loads(read_stored(module.need(part, "U8")).data.tobytes())
        n, k = map(int, state["shape"])
        block = int(state["blocksize"])
        is_nested = "nested_blocksize" in state
        nested = (int(state["nested_blocksize"]), float(state["nested_offset"])) if is_nested else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{module.full(part)} does not say how numbers are kept ({error})") from error
    count = n * k
    if min(n, k, block) <= 0 or count % 2 or module.need("weight", "U8").num_elements != count // 2:
        raise module.misfit("weight")
    if math.prod(module.need("weight.quant_map", "F32").shape) != 16:
        raise module.misfit("weight.quant_map")
    if module.need(HALF, "U8" if nested else "F32").num_elements != -(-count // block):
        raise module.misfit(HALF)
    if nested:
        module.need("weight.nested_absmax", "F32"), module.need("weight.nested_quant_map", "F32")
    return Numbers((n, k), lambda: _looked_up(module, (n, k), block, nested))


def _looked_up(module: Module, shape: tuple[int, int], block: int, nested: Any) -> Tensor:
    import torch

    data = module.tensor("weight").reshape(-1)
    numbers = module.scales("weight.quant_map").reshape(-1)[torch.stack((data >> 4, data & 15), 1).reshape(-1).int()]
    if nested is None:
        largest = module.scales(HALF).reshape(-1)
    else:
        size, offset = nested
        table, scale = module.scales("weight.nested_quant_map").reshape(-1), module.scales("weight.nested_absmax")
        found = table[module.tensor(HALF).reshape(-1).int()]
        largest = found * scale.reshape(-1).repeat_interleave(size)[: len(found)] + offset
    return numbers.mul_(largest.repeat_interleave(block)[: len(numbers)]).reshape(shape)
