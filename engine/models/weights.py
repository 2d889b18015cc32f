"""Weights on their way into a model: they come in rows, from any source and in any order, and are checked here."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.engine.background import breathe, is_beside_steps
from slipstream.engine.errors import ModelError
from slipstream.engine.models.sent_names import Place, find_place
from slipstream.kernels.stored import Stored

if TYPE_CHECKING:
    from slipstream.engine.models.protocol import CausalModel

Rows = Tensor | Stored
AnyRows = TypeVar("AnyRows", Tensor, Stored, Rows)
BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(\w+_)?(inv_freq|cos_cached|sin_cached|cos|sin)|(attn|attention)\.(masked_bias|bias)|position_ids)$"
)
"""What exporters wrote besides weights: tables and masks that every implementation makes itself."""
QUANTISED = re.compile(
    r"[._](qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|quant_state\..*|weight_(scale|packed|zero_point|shape)\w*"
    r"|(input|activation|k|v)_scale|blocks)$"
)
"""How tensors are called that quantised weights consist of, besides numbers that are called as weights are."""
PIECE_ELEMS, PIECE_ROWS = 1 << 16, 64
"""Elements and rows of a matrix that are laid out between two moments at which steps may go first: so many elements, in
whole groups of rows."""
LARGE_PIECE_ELEMS = 1 << 23
"""The same where there are no steps: enough for all threads (csrc/pack.cpp), and little beside a model."""


def unknown(name: str, owner: str) -> ModelError:
    """What is wrong with a checkpoint that has a tensor of this name, which ``owner`` has not."""
    if QUANTISED.search(name):
        return ModelError(
            f"the checkpoint holds {name!r}: its weights are quantised, and no quantization_config says how; "
            "serve the model's bfloat16 weights, or a GGUF file of it"
        )
    return ModelError(f"the checkpoint holds a tensor {name!r} that {owner} does not have")


def require_numbers(name: str, is_whole: bool) -> None:
    """Raises ModelError for weights that are whole numbers, which mean something only together with their scales."""
    if is_whole:
        raise ModelError(f"{name!r} holds whole numbers, as quantised weights do, which cannot be read")


class Weights(Protocol):
    """All weights of a model, which compute nothing before the model uses them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all tensors that there are, by their Hugging Face names; a number alone counts as [1]."""

    def fill(self, name: str, rows: Rows, first_row: int | None = None, exact: bool = False) -> None:
        """Copies a tensor, by its Hugging Face name, to its place: all of it, or the rows first_row, first_row + 1, …

        What lies in a file as quantised blocks may come as such where the model's weights are packed. Numbers of a
        matrix that is are packed again, in its form; or kept as numbers, if they are ``exact``, and all of it then.
        May run in another thread than the model. Raises ModelError for a name or a size that the model does not have.
        """

    def place(self, name: str) -> Place:
        """Where a tensor goes that a trainer calls so."""

    def read(self, name: str, first_row: int, count: int) -> Tensor:
        """Rows first_row, first_row + 1, … of a tensor as they are computed with, in some number format."""

    def kept(self, name: str, first_row: int, count: int) -> Rows:
        """The same as it is kept, for other weights of the same model: packed, or as numbers that are ``exact``."""

    @property
    def numbers(self) -> Callable[[Stored], Tensor]:
        """Makes numbers of blocks that ``kept`` told; does not keep these weights from being released."""

    @property
    def num_missing(self) -> int:
        """How many tensors have rows that have not come."""

    def missing(self) -> Sequence[tuple[str, int, int]]:
        """What has not come: name, first row and number of rows, as long as rows follow each other."""

    def check_complete(self) -> None:
        """Raises ModelError where rows have not come."""


class ReadableWeights(Protocol):
    """Weights of which rows can be read."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, first_row: int, count: int) -> Tensor: ...

    def kept(self, name: str, first_row: int, count: int) -> Rows: ...

    @property
    def numbers(self) -> Callable[[Stored], Tensor]:
        """Makes numbers of blocks that ``kept`` told; does not keep these weights from being released."""


class HostCopy:
    """A copy of weights in the memory of the host, as they are kept."""

    def __init__(self, weights: ReadableWeights) -> None:
        self.shapes = dict(weights.shapes)
        self.numbers = weights.numbers
        self.tensors = {
            name: _joined([_on_host(weights.kept(name, first, count)) for first, count in row_pieces(shape)])
            for name, shape in weights.shapes.items()
        }

    def read(self, name: str, first_row: int, count: int) -> Tensor:
        rows = self.kept(name, first_row, count)
        return self.numbers(rows) if isinstance(rows, Stored) else rows

    def kept(self, name: str, first_row: int, count: int) -> Rows:
        rows = self.tensors[name]
        return rows.rows(first_row, count) if isinstance(rows, Stored) else rows[first_row : first_row + count]


def _on_host(rows: Rows) -> Rows:
    return rows if isinstance(rows, Stored) else rows.cpu()


def _joined(parts: Sequence[Rows]) -> Rows:
    blocks = [part for part in parts if isinstance(part, Stored)]
    if not blocks:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    data = np.concatenate([part.data for part in blocks])
    return Stored(blocks[0].format, (len(data), *blocks[0].shape[1:]), data)


def load(model: CausalModel, tensors: Iterable[tuple[str, Rows]]) -> None:
    """Has a model compute with these, which are all that it has; raises ModelError for a misfit or a gap."""
    weights = model.new_weights()
    for name, tensor in tensors:
        fill_sent(weights, name, tensor)
    weights.check_complete()
    model.use(weights)


def fill_sent(weights: Weights, name: str, rows: Rows, first_row: int | None = None) -> None:
    """Fills in a tensor as a trainer calls it; its rows are experts where it joins those of a layer."""
    place = weights.place(name)
    if not place.per_row:
        for each in place.names:
            weights.fill(each, rows, first_row)
        return
    size, begin = place.shape(weights.shapes), first_row or 0
    assert size is not None
    count = len(rows.shape) and rows.shape[0]
    fits = count == size[0] if first_row is None else 0 <= begin <= begin + count <= size[0]
    if not isinstance(rows, Tensor) or tuple(rows.shape[1:]) != size[1:] or not fits:
        where = "" if first_row is None else f" from row {first_row} on"
        raise ModelError(f"tensor {name!r} has shape {list(rows.shape)}{where}, the configuration needs {list(size)}")
    for index, expert in enumerate(rows, begin):
        for each, part in zip(place.of_rows(index, 1), expert.chunk(place.per_row), strict=True):
            weights.fill(each, part)


def ahead(tensors: Iterable[tuple[str, Rows]]) -> Iterator[tuple[str, Rows]]:
    """The same; while one is used, a thread makes the next."""
    left = iter(tensors)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, left, None)
        while (found := coming.result()) is not None:
            coming = thread.submit(next, left, None)
            yield found


def row_pieces(shape: tuple[int, ...], first_row: int = 0, elems: int = PIECE_ELEMS) -> Iterator[tuple[int, int]]:
    """First row and number of rows of parts of a tensor that are laid out in about a millisecond each."""
    size = max(elems // max(math.prod(shape[1:]), 1) // PIECE_ROWS, 1) * PIECE_ROWS
    for first in range(0, shape[0], size):
        yield first_row + first, min(size, shape[0] - first)


def copy_missing(weights: Weights, source: ReadableWeights) -> None:
    """Gives weights what has not come, as another set of weights of the same model has it."""
    for name, first, count in weights.missing():
        for row, some in row_pieces((count, *weights.shapes[name][1:]), first):
            breathe()
            weights.fill(name, source.kept(name, row, some), row, exact=True)


def checksums(weights: Weights, dtype: str, names: Collection[str] | None = None) -> dict[str, str]:
    """SHA-256 of tensors by name: of their numbers in this format, row by row, each of them little-endian.

    Of all tensors, or of those that there are of what a trainer calls so.
    """
    found = {}
    for name in weights.shapes if names is None else names:
        place = place_told(weights, name)
        if place.shape(weights.shapes) is None:
            continue
        digest = hashlib.sha256()
        for each in place.names:
            for first, count in row_pieces(weights.shapes[each]):
                breathe()
                rows = weights.read(each, first, count).to("cpu", getattr(torch, dtype)).contiguous()
                digest.update(rows.view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()
    return found


def place_told(weights: Weights, name: str) -> Place:
    """What is told of a tensor that somebody asks for: of a tied output matrix the embedding."""
    place = weights.place(name)
    tied = place.names == ("lm_head.weight",) and place.names[0] not in weights.shapes
    return Place(("model.embed_tokens.weight",)) if tied else place


class Digests:
    """SHA-256 of tensors as they come, as ``checksums`` makes them of tensors that have come."""

    def __init__(self, dtype: str) -> None:
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._begun: dict[str, tuple[Any, int, dict[int, Tensor]]] = {}
        """By name: a digest of what came up to a row, that row, and what came already behind it, by first rows."""

    def add(self, name: str, rows: Tensor, first_row: int) -> None:
        """``rows`` [n, …] of any format. A tensor that comes again begins anew with its row 0."""
        digest, end, early = self._begun.get(name, (hashlib.sha256(), 0, {}))
        if first_row == 0 and end:
            digest, end, early = hashlib.sha256(), 0, {}
        early[first_row] = rows if first_row == end else rows.clone()
        while (coming := early.pop(end, None)) is not None:
            for _, piece in pieces(coming):
                digest.update(piece.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().data)
            end += len(coming)
        self._begun[name] = digest, end, early

    def of(self, name: str, count: int) -> str | None:
        """None unless all ``count`` rows have come."""
        digest, end, _ = self._begun.get(name, (None, 0, None))
        return digest.hexdigest() if digest is not None and end == count else None


def pieces(rows: AnyRows, first_row: int = 0) -> Iterator[tuple[int, AnyRows]]:
    """Parts of a tensor with the first row of each; in the background, steps go on between them."""
    if len(rows.shape) < 2:
        yield first_row, rows
        return
    elems = PIECE_ELEMS if is_beside_steps() else LARGE_PIECE_ELEMS
    for first, count in row_pieces(tuple(rows.shape), first_row, elems):
        breathe()
        begin = first - first_row
        yield first, rows.rows(begin, count) if isinstance(rows, Stored) else rows[begin : begin + count]


def require_finite(name: str, rows: Tensor) -> None:
    """Raises ModelError for numbers that are none (NaN) or infinite: no request could be computed with them."""
    if not rows.is_floating_point():
        return
    for _, piece in pieces(rows) if rows.device.type == "cpu" else [(0, rows)]:
        # The sum shows either, and is taken faster than each number is looked at; it may be too large itself.
        numbers = piece.float()
        if not numbers.sum().isfinite() and not numbers.isfinite().all():
            raise ModelError(f"tensor {name!r} has numbers that are not finite (NaN or infinite)")


def is_buffer(name: str) -> bool:
    return BUFFERS.search(name) is not None


class ExpectedTensors:
    """Holds tensors against the parameters of a model.

    Every row of every parameter has to come, with the right shape; other names must be known leftovers.
    """

    def __init__(self, expected: Mapping[str, tuple[int, ...]], optional: Collection[str] = ()) -> None:
        """``optional``: names of those that need not come."""
        self.shapes = {name: size or (1,) for name, size in expected.items()}
        self._missing: dict[str, NDArray[np.bool_]] = {
            name: np.ones(size[:1], np.bool_) for name, size in self.shapes.items() if name not in optional
        }
        """Rows that have not come, of tensors that are not complete."""

    def take(self, name: str, rows: Rows, first_row: int | None = None) -> bool:
        """True when the model has this parameter; raises ModelError on a wrong shape or an unknown name."""
        size = self.shapes.get(name)
        if size is None:
            # A tied head is stored by some although it repeats the embedding.
            if is_buffer(name) or name == "lm_head.weight":
                return False
            raise unknown(name, "this architecture")
        if isinstance(rows, Tensor):
            require_numbers(name, not rows.is_floating_point())
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

    def check_rows(self, name: str, first_row: int, count: int) -> None:
        """Raises ModelError unless there is such a tensor with these rows."""
        size = self.shapes.get(name)
        if size is None:
            raise ModelError(f"the model has no tensor {name!r}")
        if not 0 <= first_row <= first_row + count <= size[0]:
            raise ModelError(f"tensor {name!r} has {size[0]} rows, not {count} from row {first_row} on")

    def place(self, name: str) -> Place:
        return find_place(name, self.shapes)

    @property
    def num_missing(self) -> int:
        return len(self._missing)

    def missing(self) -> list[tuple[str, int, int]]:
        """Name, first row and number of the rows that have not come, as long as they follow each other."""
        found = []
        for name, rows in self._missing.items():
            borders = np.flatnonzero(np.diff(rows, prepend=False, append=False))
            found += [(name, int(first), int(end - first)) for first, end in borders.reshape(-1, 2)]
        return found

    def check_complete(self) -> None:
        if self._missing:
            some = ", ".join(sorted(self._missing)[:3])
            raise ModelError(f"the checkpoint lacks {len(self._missing)} tensors, for example {some}")
