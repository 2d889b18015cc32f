"""Weights on their way into a model: they come in rows, from any source and in any order, and are checked here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, split

from slipstream.engine.background import breathe
from slipstream.engine.errors import ModelError

if TYPE_CHECKING:
    from slipstream.engine.models.protocol import CausalModel

BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(\w+_)?(inv_freq|cos_cached|sin_cached|cos|sin)|(attn|attention)\.(masked_bias|bias)|position_ids)$"
)
"""What exporters wrote besides weights: tables and masks that every implementation makes itself."""
PIECE_ELEMS, PIECE_ROWS = 1 << 16, 64
"""Elements and rows of a matrix that are laid out between two moments at which steps may go first: so many elements, in
whole groups of rows."""


class Weights(Protocol):
    """All weights of a model, which compute nothing before the model uses them."""

    def fill(self, name: str, rows: Tensor, first_row: int | None = None) -> None:
        """Copies a tensor, by its Hugging Face name, to its place: all of it, or the rows first_row, first_row + 1, …

        May run in another thread than the model. Raises ModelError for a name or a size that the model does not have.
        """

    def check_complete(self) -> None:
        """Raises ModelError where rows have not come."""


def load(model: CausalModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Has a model compute with these, which are all that it has; raises ModelError for a misfit or a gap."""
    weights = model.new_weights()
    for name, tensor in tensors:
        weights.fill(name, tensor)
    weights.check_complete()
    model.use(weights)


def pieces(rows: Tensor, first_row: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Parts of a tensor with the first row of each; in the background, steps go on between them."""
    if rows.dim() < 2:
        yield first_row, rows
        return
    size = max(PIECE_ELEMS // max(rows[0].numel(), 1) // PIECE_ROWS, 1) * PIECE_ROWS
    for number, part in enumerate(split(rows, size)):
        breathe()
        yield first_row + number * size, part


def is_buffer(name: str) -> bool:
    return BUFFERS.search(name) is not None


class ExpectedTensors:
    """Holds tensors against the parameters of a model.

    Every row of every parameter has to come, with the right shape; other names must be known leftovers.
    """

    def __init__(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        self._expected = {name: size or (1,) for name, size in expected.items()}
        self._missing: dict[str, NDArray[np.bool_]] = {
            name: np.ones(size[:1], np.bool_) for name, size in self._expected.items()
        }
        """Rows that have not come, of tensors that are not complete."""

    def take(self, name: str, rows: Tensor, first_row: int | None = None) -> bool:
        """True when the model has this parameter; raises ModelError on a wrong shape or an unknown name."""
        size = self._expected.get(name)
        if size is None:
            # A tied head is stored by some although it repeats the embedding.
            if is_buffer(name) or name == "lm_head.weight":
                return False
            raise ModelError(f"the checkpoint holds a tensor {name!r} that this architecture does not have")
        shape = tuple(rows.shape) or (1,)
        begin = first_row or 0
        end = begin + shape[0]
        fits = shape == size if first_row is None else shape[1:] == size[1:] and 0 <= begin <= end <= size[0]
        if not fits:
            where = "" if first_row is None else f" from row {first_row} on"
            raise ModelError(f"tensor {name!r} has shape {list(shape)}{where}, the configuration needs {list(size)}")
        if (missing := self._missing.get(name)) is not None:
            missing[begin:end] = False
            if not missing.any():
                del self._missing[name]
        return True

    def check_complete(self) -> None:
        if self._missing:
            some = ", ".join(sorted(self._missing)[:3])
            raise ModelError(f"the checkpoint lacks {len(self._missing)} tensors, for example {some}")
