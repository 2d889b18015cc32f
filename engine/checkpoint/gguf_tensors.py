"""Where a model's parameters lie in a GGUF file, and how its converter has changed them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from slipstream.engine.checkpoint.gguf_architectures import TOP_NAMES, Architecture
from slipstream.engine.checkpoint.gguf_file import GGUFFile, TensorInfo, dequantised
from slipstream.engine.errors import ModelError
from slipstream.kernels.stored import Stored

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Number = TypeVar("Number", bound=np.generic)

NAME = re.compile(r"(?:blk\.(?P<layer>0|[1-9][0-9]{0,5})\.)?(?P<module>\w+)\.(?P<kind>weight|bias)")
QUERIES, KEYS = "attn_q", "attn_k"
ONE_ROW = "ffn_gate_inp_shexp"
"""A matrix of one row, which converters write as a vector."""
MOST_EXPERTS = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter in the file."""

    info: TensorInfo
    shape: tuple[int, ...]
    expert: int | None = None
    """Which matrix of the tensor it is, where that holds those of all experts."""
    rotated_heads: int = 0
    """How many heads' rows are in the order in which neighbours rotate together; 0 for the usual order."""
    is_raised: bool = False
    """Whether 1 was added to it."""

    def stored(self, file: GGUFFile) -> Stored:
        """In the order and with the numbers of Hugging Face's."""
        found = file.stored(self.info.name)
        if self.expert is not None:
            size = self.shape[0]
            data = found.data.reshape(-1, found.data.shape[1] // size)[self.expert * size : (self.expert + 1) * size]
            return Stored(found.format, self.shape, data)
        if self.is_raised:
            lowered = dequantised(found) - 1
            return Stored("F32", self.shape, lowered.view("u1").reshape(1, -1))
        if self.rotated_heads:
            rows = unpermute_rope_rows(found.data.reshape(self.shape[0], -1), self.rotated_heads)  # of a bias, numbers
            return replace(found, data=rows.reshape(found.data.shape))
        return replace(found, shape=self.shape)


def places(file: GGUFFile, kind: Architecture, heads: int, kv_heads: int) -> dict[str, Place]:
    """All parameters, by their Hugging Face names; ModelError for a tensor that is none of such a model."""
    return {name: place for info in file.tensors.values() for name, place in _of(info, file, kind, heads, kv_heads)}


def _of(info: TensorInfo, file: GGUFFile, kind: Architecture, heads: int, kv_heads: int) -> Iterator[tuple[str, Place]]:
    if info.name in kind.tables or info.name.endswith(".attn_rot_embd.weight"):
        return
    found = NAME.fullmatch(info.name)
    layer, module = (None, "") if found is None else (found["layer"], found["module"])
    theirs = (TOP_NAMES if layer is None else kind.names).get(module)
    if found is None or theirs is None:
        raise ModelError(
            f"{file.path}: tensor {info.name!r} belongs to no known part of a {kind.model_type} model. "
            "Use the Hugging Face folder of this model, which works through the transformers fallback."
        )
    name = f"{theirs}.{found['kind']}" if layer is None else f"model.layers.{layer}.{theirs}.{found['kind']}"
    if "{}" in name:
        if len(info.shape) != 3 or info.shape[0] > MOST_EXPERTS:
            raise ModelError(f"{file.path}: tensor {info.name!r} has shape {list(info.shape)}, of experts 3 are needed")
        for expert in range(info.shape[0]):
            yield name.replace("{}", str(expert)), Place(info, info.shape[1:], expert)
        return
    shape = (1, *info.shape) if module == ONE_ROW and len(info.shape) == 1 else info.shape
    rotated = {QUERIES: heads, KEYS: kv_heads}.get(module, 0) if kind.rotates_neighbours else 0
    if rotated and shape[0] % (2 * rotated):
        raise ModelError(f"{file.path}: tensor {info.name!r} has {shape[0]} rows, which {rotated} heads cannot share")
    yield name, Place(info, shape, None, rotated, kind.raised_norms and module.endswith("norm"))


def unpermute_rope_rows(rows: npt.NDArray[Number], num_heads: int) -> npt.NDArray[Number]:
    """Undoes, of rows [rows, anything], the order of query and key projections in which neighbours rotate together.

    There rows (2i, 2i + 1) of a head do, in Hugging Face's order rows (i, i + head_dim / 2).
    """
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)
