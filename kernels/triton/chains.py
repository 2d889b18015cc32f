"""Chains of draft tokens that follow a step before anybody has read what it sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels.batch import NO_MIRRORS
from slipstream.kernels.compute import ChainInputs, Choose
from slipstream.kernels.triton.device_batch import DeviceBatch
from slipstream.kernels.triton.kv_cache import TritonKVCache
from slipstream.kernels.triton.room import Room, padded, update
from slipstream.kernels.triton.staging import Array, packed, views

if TYPE_CHECKING:
    from slipstream.kernels.triton.stack import TritonStack


class TritonChains:
    """Two pieces of work, each a graph where there is one: what is new of every sequence, and then all draft tokens.

    How many draft tokens were right is found out in the first. In both, what the host tells lies at one place: in the
    room of a graph, or where it came.
    """

    def __init__(self, stack: TritonStack, given: ChainInputs, cache: TritonKVCache) -> None:
        self._stack, self._given, self._cache = stack, given, cache
        batch, count, bucket = given.batch, given.batch.num_segments, stack.graphs.bucket
        self._mirror = stack.mirror(batch.block_tables)
        known = batch.kv_len - (given.verified != -1).sum(1, dtype=np.int32)
        self._ends = known + np.minimum(given.places, given.verified.shape[1] + given.wanted + 1)
        """[sequences] the length of each in the cache afterwards, at most."""
        self._changes = self._mirror.changes(replace(batch, kv_len=np.maximum(self._ends, batch.kv_len)))

        self._new_room = self._room(bucket(batch.num_tokens), self._new_arrays)
        self._room_of_chains = self._room(bucket(count), self._chain_arrays)
        self._new = self._new_arrays(self._new_room)
        self._chain = self._chain_arrays(self._room_of_chains)
        self.arrays = packed(self._new), packed(self._chain)

    def make(self, columns: Sequence[Tensor], samples: Tensor, hidden: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
        return self._follow(columns[1], *self._show(columns[0], samples, hidden), choose)

    def _room(self, tokens: int | None, arrays: Callable[[Room | None], list[Array]]) -> Room | None:
        room = None if tokens is None else self._stack.room(tokens)
        return room if room is None or room.has_room(arrays(room)) else None

    def _new_arrays(self, room: Room | None) -> list[Array]:
        given, batch = self._given, self._given.batch
        new = [given.samples, given.first, given.last, given.verified]
        if room is None:
            whose = [] if batch.whose is None else [batch.whose]
            own = [batch.token_ids, batch.q_start, batch.kv_len, batch.table_row, NO_MIRRORS, *whose]
            return [*own, *new, self._changes]
        verified = np.full((room.tokens, given.verified.shape[1]), -1, np.int32)
        verified[: len(given.verified)] = given.verified
        new = [*(_lengthened(each, room.tokens) for each in new[:-1]), verified]
        # What is not always of one size comes last, so that the graph finds everything where it was.
        return [*padded(batch, room.tokens), *new, self._changes]

    def _chain_arrays(self, room: Room | None) -> list[Array]:
        given, count = self._given, self._given.batch.num_segments
        ones = np.arange(count + 1, dtype=np.int32)
        known = given.batch.kv_len - (given.verified != -1).sum(1, dtype=np.int32)
        one = replace(given.batch, token_ids=ones[:-1], q_start=ones, kv_len=known + 1, missed=None, whose=None)
        columns = [given.places, given.wanted, *given.columns]
        if room is None:
            return [one.token_ids, one.q_start, one.kv_len, one.table_row, NO_MIRRORS, *columns]
        return [*padded(one, room.tokens), *(_lengthened(column, room.tokens) for column in columns)]

    def _show(self, column: Tensor, samples: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The layers' output before each chain; and by how much each is further on than the host has it, how many draft
        tokens were wrong, and the token that was sampled last [sequences, 3]."""
        stack, batch, room, cache = self._stack, self._given.batch, self._new_room, self._cache
        stack.follow(cache)
        tokens, device = batch.num_tokens, samples.device
        slab = _there(column, room)
        ids, starts, lengths, rows, mirrors, *others, which, first, last, verified, changed = views(slab, self._new)
        update(self._mirror, changed, self._changes)
        latest = samples.index_select(0, which)
        given = hidden
        if room is None:
            positions, cells = (torch.empty(tokens, dtype=torch.int32, device=device) for _ in range(2))
        else:
            positions, cells = room.positions, room.cells
            room.latest.copy_(latest)
            room.hidden[:tokens].copy_(hidden)
            latest, given = room.latest, room.hidden
        whose = others[0] if others else None
        on_device = DeviceBatch(
            *(ids, starts, lengths, rows, mirrors, self._mirror.tables, positions, cells, batch.block_size, latest),
            missed=batch.missed,
            whose=whose,
        )
        longest = int(batch.kv_len.max())
        most = longest if room is None else stack.reach(longest)

        def work() -> tuple[Tensor, Tensor]:
            host, now = batch if room is None else None, on_device.settled()
            plan = cache.plan_on_device(now, most, prompt=room is None and not stack.is_invariant, host=host)
            done = stack.run(now, plan, given.to(stack.dtype), ()).hidden
            at = first[:, None] + torch.arange(verified.shape[1], dtype=torch.int32, device=device)
            expected, wrong = verified, (verified != -1).sum(1, dtype=torch.int32)
            if batch.latest is not None:  # below -1 are those that the host does not know
                known = batch.latest.index_select(0, (-2 - verified).clamp(min=0).flatten()).view_as(verified)
                expected = known * (verified < -1) + verified * (verified >= -1)
            right = (_taken(latest, at) == expected).int().cumprod(1).sum(1, dtype=torch.int32)
            moved = right + now.kv_len - lengths
            return done.index_select(0, last + right), torch.stack(
                (moved, wrong - right, _taken(latest, first + right)), 1
            )

        key = ("new", len(ids), most, verified.shape[1], id(self._mirror), id(batch.latest), id(batch.missed))
        found: tuple[Tensor, Tensor] = work() if room is None else stack.graphs.run(stack, key, work)
        return found

    def _follow(self, column: Tensor, hidden: Tensor, ends: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
        stack, room, cache, depth = self._stack, self._room_of_chains, self._cache, self._given.depth
        count = self._given.batch.num_segments
        hidden, ends = hidden[:count], ends[:count]
        if room is not None:
            room.hidden[:count].copy_(hidden)
            room.ends[:count].copy_(ends)
            hidden, ends = room.hidden, room.ends
            positions, cells = room.positions, room.cells
        else:
            positions, cells = (torch.empty(count, dtype=torch.int32, device=column.device) for _ in range(2))
        slab = _there(column, room)
        ids, starts, lengths, rows, mirrors, there, wanted, *columns = views(slab, self._chain)
        on_device = DeviceBatch(
            *(ids, starts, lengths, rows, mirrors, self._mirror.tables, positions, cells, self._given.batch.block_size)
        )
        longest = int(self._ends.max())
        most = longest if room is None else stack.reach(longest)

        def work() -> tuple[Tensor, Tensor]:  # leaves what was sent as it was, since recording runs it several times
            moved = ends[:, 0]
            begin = (lengths + moved) * (lengths > 0)  # rows without a sequence stay so
            left = torch.minimum(wanted, there - moved).clamp(min=0)
            found, chain, x = [], [], hidden
            for step in range(depth):
                tokens, told = choose(stack.logits(x), moved + step, columns)
                found.append(told)
                chain.append(tokens)
                if step + 1 < depth:
                    ids.copy_(tokens)
                    # A sequence without a block for the next place stays where it is.
                    now = replace(on_device, kv_len=(begin + (left - 1).clamp(max=step)).clamp(min=0))
                    plan = cache.plan_on_device(now, most, prompt=False)
                    x = stack.run(now, plan, x, (), left > step).hidden
            return torch.stack(found), torch.cat((ends[:, 1:], torch.stack(chain, 1)), 1)

        key = ("chains", len(ids), most, depth, choose.kind, id(self._mirror))
        told, standing = work() if room is None else stack.graphs.run(stack, key, work)
        return told[:, :count].clone(), standing[:count].clone()  # the next graph overwrites what this one returns


def _taken(numbers: Tensor, at: Tensor) -> Tensor:
    """Numbers at places [...], of which those beyond the end say nothing."""
    return numbers.index_select(0, at.clamp(max=len(numbers) - 1).flatten()).view_as(at)


def _lengthened(array: Array, count: int) -> Array:
    return np.pad(array, (0, count - len(array)))


def _there(column: Tensor, room: Room | None) -> Tensor:
    """What came as a column, where graphs read it."""
    came = column.view(torch.uint8)
    if room is None:
        return came
    room.slab[: len(came)].copy_(came)
    return room.slab
