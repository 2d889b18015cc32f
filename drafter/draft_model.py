"""Drafts with a small model that shares the target's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from slipstream.drafter.autoregressive import AutoregressiveDrafter, last_of
from slipstream.engine.errors import ModelError
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.speculation.protocol import DraftHost, DraftRow, Proposal
from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.kv_cache import PagedKVCache

MOST_AT_ONCE = 256
"""Positions per request that the model catches up with in one step; a long prompt takes it several."""
MOST_PADDING = 512
"""Models of one family may have padded the vocabulary of one tokenizer to different sizes: Qwen2.5 has 151,936 tokens
up to 3B and 152,064 above, Pythia 50,304 to 50,688."""

Load = Callable[[CausalModel, int], CausalModel]
"""Loads the draft model for a target and sequences of so many tokens."""


class ModelDrafter(AutoregressiveDrafter):
    name = "draft"

    def __init__(self, load: Load, stop_below: float = 0.05, width: int = 1) -> None:
        super().__init__(stop_below, width)
        self._load = load
        self._model: CausalModel

    def attach(self, host: DraftHost) -> None:
        super().attach(host)
        length = host.block_tables.shape[1] * host.block_size
        self._model = self._load(host.model, length)
        ours, theirs = self._model.shape, host.model.shape
        if abs(ours.vocab_size - theirs.vocab_size) > MOST_PADDING:
            raise ModelError(
                f"the draft model does not share the tokenizer: its vocabulary is {ours.vocab_size}, the model's "
                f"{theirs.vocab_size}; name one of its family with --draft-model"
            )
        self._cache = self._model.new_cache(host.num_blocks, host.block_size)

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        behind = [row for row in rows if not self._is_ready(row)]
        if behind:  # one of them, so that a step stays short
            self._compute(behind[:1], MOST_AT_ONCE)
        return super().propose(rows)

    def _is_ready(self, row: DraftRow) -> bool:
        return row.length - self._computed(row) <= MOST_AT_ONCE

    def _catch_up(self, rows: Sequence[DraftRow]) -> Tensor:
        return self._compute(rows, MOST_AT_ONCE)

    @property
    def caches(self) -> Sequence[PagedKVCache]:
        return [self._cache]

    @property
    def _kv(self) -> PagedKVCache:
        return self._cache

    def _advance(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        return self._model.forward(batch, self._cache).hidden

    def _scores(self, hidden: Tensor) -> Tensor:
        """Without the tokens that the target lacks."""
        logits = self._model.logits(hidden, np.arange(len(hidden), dtype=np.int32))
        return logits[:, : self._host.model.shape.vocab_size].contiguous()

    @property
    def _vocabulary(self) -> Tensor | None:
        return None

    def _position(self, row: DraftRow) -> int:
        return row.length

    def _computed(self, row: DraftRow) -> int:
        """Positions whose keys and values are of known tokens."""
        computed = row.memory.get(self.name, 0)
        assert isinstance(computed, int)
        return computed

    def _compute(self, rows: Sequence[DraftRow], most: int) -> Tensor:
        """Computes at most so many of the new known tokens of each row; the output at the last of them."""
        starts = [self._computed(row) for row in rows]
        ends = np.array([min(start + most, row.length) for row, start in zip(rows, starts, strict=True)], np.int32)
        ids = np.concatenate([row.known[start:end] for row, start, end in zip(rows, starts, ends, strict=True)])
        ids[ids >= self._model.shape.vocab_size] = 0  # what a padded vocabulary has more than ours stands for no text
        counts = ends - np.array(starts, np.int32)
        batch = self._batch(rows, ids, counts, ends, (last_of(counts),))
        computed = self._model.forward(batch, self._cache)
        for row, end in zip(rows, ends, strict=True):
            row.memory[self.name] = int(end)
        return computed.hidden[computed.columns[0]]
