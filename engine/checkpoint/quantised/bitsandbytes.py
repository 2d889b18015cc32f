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
TABLE, NESTED, NESTED_TABLE = "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"
ORDER = "weight_format"
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
        if SCALES not in module.parts and ORDER not in module.parts:
            return None
        weight = module.need("weight", "I8")
        scales = module.need(SCALES, "F32")
        if len(weight.shape) != 2 or scales.shape != weight.shape[:1]:
            raise module.misfit(SCALES)
        n, k = weight.shape
        if (order := module.parts.get(ORDER)) is not None and read_stored(order).data.any():
            raise ModelError(
                f"{module.full(ORDER)} says that numbers lie in another order than by rows, which cannot be read; save "
                "the model again with a newer bitsandbytes, or serve its bfloat16 weights"
            )
        rows = lambda: module.tensor("weight").float().mul_(module.scales(SCALES)[:, None]).mul_(ONE_127TH)  # noqa: E731
        return Numbers((n, k), rows)


def _four_bits(module: Module, part: str) -> Matrix:
    try:
        state = json.loads(read_stored(module.need(part, "U8")).data.tobytes())
        n, k = map(int, state["shape"])
        block = int(state["blocksize"])
        is_nested = "nested_blocksize" in state
        nested = (int(state["nested_blocksize"]), float(state["nested_offset"])) if is_nested else None
        if min(n, k, block, nested[0] if nested else 1) <= 0 or (nested and not math.isfinite(nested[1])):
            raise ValueError("sizes have to be positive, and an offset finite")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{module.full(part)} does not say how numbers are kept ({error})") from error
    count, weight = n * k, module.need("weight")  # bytes, whatever format they are stored as (bnb_4bit_quant_storage)
    if count % 2 or weight.end - weight.begin != count // 2:
        raise module.misfit("weight")
    blocks = -(-count // block)
    sizes = {TABLE: 16, HALF: blocks}
    if nested:
        sizes |= {NESTED: -(-blocks // nested[0]), NESTED_TABLE: 256}
    for part_of, size in sizes.items():
        if module.need(part_of, "U8" if nested and part_of == HALF else "F32").num_elements != size:
            raise module.misfit(part_of)
    return Numbers((n, k), lambda: _looked_up(module, (n, k), block, nested))


def _looked_up(module: Module, shape: tuple[int, int], block: int, nested: Any) -> Tensor:
    import torch

    data = module.bytes("weight").reshape(-1)
    numbers = module.scales(TABLE).reshape(-1)[torch.stack((data >> 4, data & 15), 1).reshape(-1).int()]
    if nested is None:
        largest = module.scales(HALF).reshape(-1)
    else:
        size, offset = nested
        table, scale = module.scales(NESTED_TABLE).reshape(-1), module.scales(NESTED)
        found = table[module.tensor(HALF).reshape(-1).int()]
        largest = found * _each(scale.reshape(-1), size, len(found)) + offset
    return numbers.mul_(_each(largest, block, len(numbers))).reshape(shape)


def _each(numbers: Tensor, block: int, count: int) -> Tensor:
    """Those of the blocks that ``count`` elements are in, one for each element; blocks may be larger than all of it."""
    return numbers.repeat_interleave(min(block, count))[:count]
