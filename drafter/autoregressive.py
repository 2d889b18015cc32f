"""Drafting with a network that has a paged cache of its own: token by token, or several tokens at each place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.drafter.choosing import EVIDENCE_BORDERS, RUNNERS, SHARPNESS, Draft, parameters_of, raced
from slipstream.engine.speculation.protocol import Drafter, DraftHost, DraftNeeds, DraftRow, Proposal
from slipstream.kernels import ops
from slipstream.kernels.batch import Int32, RaggedBatch, make_batch
from slipstream.kernels.host_chains import HostChains, MadeChains
from slipstream.kernels.kv_cache import PagedKVCache
from slipstream.kernels.readback import sent


@dataclass(frozen=True, slots=True)
class _Beam:
    """A path whose end the network has seen, or is to see now."""

    draft: Draft
    node: int
    """The end of it; -1 for the last known token."""
    table_row: int
    mapped: int
    """Positions that have a block in its table row."""


class AutoregressiveDrafter(Drafter):
    """Takes the network's best tokens, feeds them back, and so on.

    For a greedy request these are the most likely ones. For a sampled one they are the first of the race that the
    network's distribution runs at the request's temperature and filters with the noise that the target's will run with:
    a token that both give much weight wins both, and at temperature 1 that happens a third more often than that the
    target draws the network's most likely token (Daliri et al. 2025 give the bound).

    With a width of one these are chains. Else they are the dynamic trees of EAGLE-2 (Li et al. 2024): at each depth the
    most likely paths, ``width`` of them, go on with ``width`` tokens each, and the most likely nodes of all are kept.

    The network's keys and values lie in the same blocks as the target's, so room, prefix hits and eviction are decided
    once. What it wrote for draft tokens is overwritten when it catches up. Where it was not asked for a while, or a
    cached block was filled without it, its keys and values are old or missing; that costs acceptance, never
    correctness.
    """

    num_evidence = 2 * (len(EVIDENCE_BORDERS) + 1)

    def __init__(self, stop_below: float = 0.05, width: int = 1) -> None:
        """A draft does not go on where the probability that all of it is right falls below ``stop_below``.

        This is the threshold rule of SpecDec++ (Huang et al. 2024) with the network's own probabilities.
        """
        self._stop_below = stop_below
        self._width = width
        self.needs = DraftNeeds(costly=True, own_blocks=True, branches=width > 1)
        self._host: DraftHost

    def attach(self, host: DraftHost) -> None:
        self._host = host

    @property
    @abstractmethod
    def _kv(self) -> PagedKVCache:
        """The network's keys and values."""

    @abstractmethod
    def _is_ready(self, row: DraftRow) -> bool:
        """Whether the network can draft after the last known token now."""

    @abstractmethod
    def _catch_up(self, rows: Sequence[DraftRow]) -> Tensor:
        """Shows the network what is known and new; its output after the last known token, [rows, hidden]."""

    @abstractmethod
    def _advance(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        """The network's output after one draft token more per segment; ``hidden`` is the output before."""

    @abstractmethod
    def _scores(self, hidden: Tensor) -> Tensor:
        """Logits of the draft vocabulary [rows, n] float32."""

    @property
    @abstractmethod
    def _vocabulary(self) -> Tensor | None:
        """The target's tokens [n] int32 that columns of ``_scores`` stand for; None if these are its first ones."""

    @abstractmethod
    def _position(self, row: DraftRow) -> int:
        """Where the network's cache takes the first draft token."""

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        live = [row for row in rows if self._is_ready(row)]
        if not live:
            return [None] * len(rows)
        hidden = self._catch_up(live)
        self._host.scratch.reset()
        drafts = [Draft(row, self._host.scratch.count // len(live)) for row in live]
        if self._width > 1 or not self._draft_at_once(drafts, hidden):
            self._draft_by_depth(drafts, hidden)
        proposals = {id(draft.row): draft.proposal() for draft in drafts}
        return [proposals.get(id(row)) for row in rows]

    def _at_once(self, asked: HostChains, hidden: Tensor) -> MadeChains | None:
        """See ``Stack.draft``; None without having done anything where the network has no such call."""
        return None

    def _draft_at_once(self, drafts: list[Draft], hidden: Tensor) -> bool:
        """Chains alone; whether it could."""
        rows, host = [draft.row for draft in drafts], self._host
        *filters, seeds, indices = parameters_of(rows, [row.index for row in rows])
        asked = HostChains(
            host.block_tables,
            np.array([row.slot for row in rows], np.int32),
            host.block_size,
            np.array([self._position(row) for row in rows], np.int32),
            np.array([row.mapped for row in rows], np.int32),
            np.array([row.most for row in rows], np.int32),
            self._stop_below,
            self._vocabulary,
            (filters[0], filters[1], filters[2], filters[3]),
            seeds,
            indices,
            RUNNERS,
            SHARPNESS,
        )
        if (made := self._at_once(asked, hidden)) is None:
            return False
        for place, draft in enumerate(drafts):
            for node, (token, likely) in enumerate(zip(*made.of(place), strict=True)):
                draft.add(node - 1, [token], [likely])
        return True

    def _draft_by_depth(self, drafts: list[Draft], hidden: Tensor) -> None:
        live = [draft.row for draft in drafts]
        beams = [_Beam(draft, -1, draft.row.slot, draft.row.mapped) for draft in drafts]
        for depth in range(max(row.most for row in live)):
            for beam, (likely, tokens) in zip(beams, self._choose(beams, depth, hidden), strict=True):
                beam.draft.add(beam.node, tokens, likely)
            goes_on, copies = self._go_on(beams, depth)
            if not goes_on:
                break
            if copies:
                self._kv.copy_blocks(copies)
            beams = [beam for beam, _ in goes_on]
            before = sent(np.array([before for _, before in goes_on]), hidden.device)
            hidden = self._advance(self._next(beams, depth), hidden[before])

    def _go_on(self, beams: list[_Beam], depth: int) -> tuple[list[tuple[_Beam, int]], list[tuple[int, int]]]:
        """The paths to follow, each with the index of the one it goes on from; and the blocks to copy for that.

        A first child goes on in the table row of its parent; others get a row with a copy of the last block.
        """
        ends = {(id(beam.draft), beam.node): at for at, beam in enumerate(beams)}
        goes_on: list[tuple[_Beam, int]] = []
        copies: list[tuple[int, int]] = []
        taken: set[int] = set()
        for draft in {id(beam.draft): beam.draft for beam in beams}.values():
            if depth + 1 >= draft.row.most:
                continue
            position = self._position(draft.row) + depth
            # What is not among the best by now will not be, nor what follows it.
            best = [
                (node, before)
                for node in draft.best()
                if (before := ends.get((id(draft), draft.parents[node]))) is not None
            ]
            for node, before in best[: self._width]:
                if draft.chance[node] < self._stop_below:
                    continue
                beam = beams[before]
                if before not in taken:
                    if position < beam.mapped:
                        taken.add(before)
                        goes_on.append((_Beam(draft, node, beam.table_row, beam.mapped), before))
                elif (fork := self._fork(draft, beam, position, copies)) is not None:
                    goes_on.append((_Beam(draft, node, *fork), before))
        return goes_on, copies

    def _fork(self, draft: Draft, beam: _Beam, position: int, copies: list[tuple[int, int]]) -> tuple[int, int] | None:
        """A table row for another path after ``beam``, and how many positions it has blocks for."""
        scratch, size = self._host.scratch, self._host.block_size
        last = self._position(draft.row) + draft.row.most - 1
        if scratch.need(position, last) > draft.room:
            return None
        table_row = scratch.fork(beam.table_row, position, last)
        if table_row is None:
            return None
        draft.room -= scratch.need(position, last)
        if position % size:
            index = position // size
            tables = self._host.block_tables
            copies.append((int(tables[beam.table_row, index]), int(tables[table_row, index])))
        return table_row, (last // size + 1) * size

    def _next(self, beams: Sequence[_Beam], depth: int) -> RaggedBatch:
        """The last token of every path."""
        ids = np.array([beam.draft.tokens[beam.node] for beam in beams], np.int32)
        ends = np.array([self._position(beam.draft.row) + depth + 1 for beam in beams], np.int32)
        table_rows = np.array([beam.table_row for beam in beams], np.int32)
        ones = np.ones(len(beams), np.int32)
        return make_batch(ids, ones, ends, self._host.block_tables, table_rows, self._host.block_size)

    def _batch(
        self, rows: Sequence[DraftRow], ids: Int32, counts: Int32, ends: Int32, columns: tuple[NDArray[Any], ...] = ()
    ) -> RaggedBatch:
        slots = np.array([row.slot for row in rows], np.int32)
        tables, size = self._host.block_tables, self._host.block_size
        return make_batch(ids, counts, ends, tables, slots, size, columns=columns)

    def _choose(self, beams: Sequence[_Beam], depth: int, hidden: Tensor) -> list[tuple[list[float], list[int]]]:
        """Probabilities and tokens of the best draft tokens after each path."""
        rows = [beam.draft.row for beam in beams]
        scores = self._scores(hidden)
        chosen: list[tuple[list[float], list[int]]] = [([], [])] * len(rows)
        for races in (False, True):
            places = [place for place, row in enumerate(rows) if (row.params.temperature > 0) == races]
            if not places:
                continue
            some = scores if len(places) == len(rows) else scores[places]
            likely, columns = self._race(some, [rows[at] for at in places], depth) if races else self._most_likely(some)
            tokens = columns if self._vocabulary is None else self._vocabulary[columns]
            for place, found, probabilities in zip(places, tokens.tolist(), likely.tolist(), strict=True):
                count = sum(probability > 0 for probability in probabilities)
                chosen[place] = probabilities[:count], found[:count]
        return chosen

    def _most_likely(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and columns of the most likely tokens of each row."""
        if self._width == 1:
            indices, likely = ops.argmax_with_probability(scores)
            return likely[:, None], indices[:, None]
        values, indices = scores.topk(min(self._width, scores.shape[-1]), dim=-1)
        return (values - torch.logsumexp(scores, -1, keepdim=True)).exp(), indices

    def _race(self, scores: Tensor, rows: Sequence[DraftRow], depth: int) -> tuple[Tensor, Tensor]:
        """The same of the first of each row's race for the token ``depth`` after its next one; 0 where nobody runs."""
        parameters = [
            sent(column, scores.device) for column in parameters_of(rows, [row.index + depth for row in rows])
        ]
        return raced(scores, parameters, self._width, self._vocabulary)


def last_of(counts: Int32) -> Int32:
    """Places of the last tokens of segments of so many, which lie end to end."""
    return (np.cumsum(counts) - 1).astype(np.int32)
