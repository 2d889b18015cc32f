"""Cases of drawing tokens; see ``slipstream.kernels.cases``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from slipstream.kernels import ops, reference
from slipstream.kernels.cases import Case, Prepared, Sizes, Source, prepared, size

_PLAIN = reference.ReferenceOps()


def cases(backend: str) -> Iterator[Case]:
    float32 = (torch.float32,)
    yield Case(f"draw, {backend}", partial(_draw, backend), float32)
    yield Case(f"race of a draft vocabulary, {backend}", partial(_race, backend), float32)


def _draw(backend: str, source: Source, sizes: Sizes) -> Prepared:
    weights = source.uniform(sizes.streams, sizes.vocab)
    columns = (source.integers(1 << 60, sizes.streams, dtype=torch.int64) for _ in range(2))
    return prepared(
        backend,
        ops.draw,
        lambda weights, seeds, indices: _PLAIN.race(weights, seeds, indices, 1, None)[0][:, 0],
        (weights, *columns),
        size(weights),
    )


def _race(backend: str, source: Source, sizes: Sizes) -> Prepared:
    """Among every other token, as a drafter with a vocabulary of its own has them."""
    weights = source.uniform(sizes.streams, sizes.vocab // 2)
    columns = (source.integers(1 << 60, sizes.streams, dtype=torch.int64) for _ in range(2))
    ids = torch.arange(weights.shape[1], dtype=torch.int32, device=source.device) * 2
    return prepared(
        backend,
        lambda weights, seeds, indices: ops.race(weights, seeds, indices, 4, ids),
        lambda weights, seeds, indices: _PLAIN.race(weights, seeds, indices, 4, ids),
        (weights, *columns),
        size(weights, ids),
    )
