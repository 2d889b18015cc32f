"""Drafts with an EAGLE-3 head: one small layer that continues the target's own features."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slipstream.drafter.autoregressive import AutoregressiveDrafter
from slipstream.drafter.head import layout
from slipstream.drafter.head.layout import HeadConfig
from slipstream.drafter.head.network import HeadNetwork, make_network
from slipstream.engine.errors import ConfigError, ModelError
from slipstream.engine.models.config import DecoderConfig
from slipstream.engine.models.loader import available_memory
from slipstream.engine.models.native_decoder import NativeDecoder
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.models.torch_decoder import TorchDecoder
from slipstream.engine.speculation.protocol import Computed, DraftHost, DraftRow, LearnedDrafter, Proposal
from slipstream.kernels.batch import Int32, RaggedBatch
from slipstream.kernels.kv_cache import PagedKVCache

MOST_PENDING = 512
"""Positions per request that wait for the head while nobody asks it; older ones are left out."""

SPARE_BYTES = 200 << 20
"""Memory that loading one more head leaves free."""
SHARED = ""
"""The route for every request whose own holds nothing."""


@dataclass(frozen=True, slots=True)
class FirstHead:
    """The head that a drafter begins with."""

    config: HeadConfig
    tensors: Mapping[str, Tensor]
    version: int = 1


Load = Callable[[DecoderConfig], FirstHead]
"""Reads or makes a head for a target."""
Read = Callable[[Path, DecoderConfig], tuple[HeadConfig, Mapping[str, Tensor]]]
"""Reads the head in a folder; raises ModelError if it is damaged or was not made for this target."""


@dataclass(slots=True)
class _Pending:
    """Features that the head has not seen: positions start, start + 1, …, as the head reads them."""

    start: int
    parts: deque[Tensor]
    """[positions, hidden] of one step each: put together only when the head is asked, which may be never."""
    count: int
    """Positions in all parts."""

    def add(self, rows: Tensor) -> None:
        """Of the next positions; of more than can wait, the last."""
        self.parts.append(rows)
        self.count += len(rows)
        while self.count > MOST_PENDING:
            first = self.parts[0]
            left_out = min(self.count - MOST_PENDING, len(first))
            if left_out == len(first):
                self.parts.popleft()
            else:
                self.parts[0] = first[left_out:]
            self.start += left_out
            self.count -= left_out


@dataclass(frozen=True, slots=True)
class _Head:
    """What a route holds. After a swap the network is the same one, with other weights."""

    network: HeadNetwork
    version: int
    to_target: Int32
    """[draft vocabulary]: the target's tokens."""


class HeadDrafter(AutoregressiveDrafter, LearnedDrafter):
    """Position p of the head holds the features of position p and token p + 1, and predicts token p + 2.

    The features of accepted tokens are the target's own; while drafting, the head's output stands in for them.

    Each route has a network of its own, with keys and values of its own. What a request has there from before a swap,
    or lacks because its route was empty until now, costs acceptance only.
    """

    name = "head"

    def __init__(
        self,
        load: Load,
        stop_below: float = 0.05,
        width: int = 1,
        most: int = 4,
        read: Read = layout.read,
    ) -> None:
        """``load`` gives the shared head to start with; ``most`` heads may be loaded at once.

        ``read`` opens the folder of every version that is swapped in later.
        """
        super().__init__(stop_below, width)
        self._load = load
        self._most, self._read = most, read
        self._config: HeadConfig
        self._first: FirstHead | None = None
        self._heads: dict[str, _Head] = {}
        self._head: _Head
        """The one that drafts at the moment."""

    def taps(self, model: CausalModel) -> tuple[int, ...]:
        if not isinstance(model, NativeDecoder | TorchDecoder):
            raise ConfigError(
                f"a head reads hidden states, which {model.shape.model_type} models, run through transformers, do not "
                "show; use --speculation ngram,suffix"
            )
        self._first = self._load(model.config)
        self._config = self._first.config
        layout.check_target(self._config, model.config)
        return self._config.taps

    def attach(self, host: DraftHost) -> None:
        super().attach(host)
        first, self._first = self._first, None
        assert first is not None, "taps comes first"
        network = make_network(first.config, host)
        network.stage(first.tensors)
        network.swap()
        self._heads[SHARED] = self._head = _Head(network, first.version, _guessable(first.config, first.tensors))

    @property
    def routes(self) -> Mapping[str, int]:
        return {route: head.version for route, head in self._heads.items()}

    @property
    def memory_bytes(self) -> int:
        return sum(head.network.memory_bytes for head in self._heads.values())

    def prepare(self, route: str, version: int, path: str) -> Callable[[], None]:
        if version < 1:
            raise ConfigError(f"a drafter's version is a number from 1 on, not {version}")
        head = self._heads.get(route)
        if head is None and len(self._heads) >= self._most:
            raise ConfigError(
                f"{len(self._heads)} drafters are loaded (routes {', '.join(map(repr, self._heads))}): drop one, or "
                "start the server with more --max-drafters"
            )
        target = self._host.model
        assert isinstance(target, NativeDecoder | TorchDecoder)
        config, tensors = self._read(Path(path), target.config)
        self._require_same_sizes(config)
        network = self._new_network(target.device) if head is None else head.network
        network.stage(tensors)
        ready = _Head(network, version, _guessable(config, tensors))

        def swap() -> None:
            network.swap()
            self._heads[route] = ready

        return swap

    def drop(self, route: str) -> None:
        if route == SHARED or route not in self._heads:
            what = "the shared drafter cannot be dropped" if route == SHARED else f"route {route!r} holds no drafter"
            raise ConfigError(f"{what}; loaded are the routes {', '.join(map(repr, self._heads))}")
        del self._heads[route]

    def _new_network(self, device: torch.device) -> HeadNetwork:
        """For one more route; raises ModelError if there is no memory for it."""
        needed, free = self._heads[SHARED].network.memory_bytes, available_memory(device)
        if free < needed + SPARE_BYTES:
            raise ModelError(f"one more drafter takes {needed >> 20} MiB, and only {free >> 20} MiB of memory are free")
        return make_network(self._config, self._host)

    def _require_same_sizes(self, config: HeadConfig) -> None:
        """Networks are built once, and the target shows the layers it was asked for at the start."""
        for field in fields(HeadConfig):
            ours, theirs = getattr(self._config, field.name), getattr(config, field.name)
            if ours != theirs and field.name != "max_positions":
                raise ModelError(
                    f"the drafter does not fit the running one: its {field.name} is {theirs}, the running one's {ours}"
                )

    def _by_route(self, rows: Sequence[DraftRow]) -> Iterator[list[int]]:
        """Places of rows that share a head, which drafts meanwhile."""
        places: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row.route if row.route in self._heads else SHARED, []).append(place)
        for route, some in places.items():
            self._head = self._heads[route]
            yield some

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        proposals: list[Proposal | None] = [None] * len(rows)
        for places in self._by_route(rows):
            for place, proposal in zip(places, super().propose([rows[place] for place in places]), strict=True):
                proposals[place] = proposal and replace(proposal, version=self._head.version)
        return proposals

    def observe(self, computed: Sequence[Computed]) -> None:
        for places in self._by_route([entry.row for entry in computed]):
            self._remember([computed[place] for place in places])

    def _remember(self, computed: Sequence[Computed]) -> None:
        fused = self._head.network.fuse(torch.cat([entry.features for entry in computed]))
        parts = torch.split(fused, [len(entry.features) for entry in computed])
        for entry, rows in zip(computed, parts, strict=True):
            pending = entry.row.memory.get(self.name)
            if not (isinstance(pending, _Pending) and pending.start + pending.count == entry.start):
                pending = entry.row.memory[self.name] = _Pending(entry.start, deque(), 0)
            pending.add(rows)

    def _is_ready(self, row: DraftRow) -> bool:
        """Whether the features up to the last but one token, after which the next guess comes, are at hand."""
        pending = row.memory.get(self.name)
        return isinstance(pending, _Pending) and pending.start + pending.count == row.length - 1

    def _catch_up(self, rows: Sequence[DraftRow]) -> Tensor:
        """Shows the head what the target computed since it was asked last; its output at the last positions."""
        pendings = []
        for row in rows:
            pending = row.memory.pop(self.name)
            assert isinstance(pending, _Pending)
            pendings.append(pending)
        ids = np.concatenate([row.known[pending.start + 1 :] for row, pending in zip(rows, pendings, strict=True)])
        counts = np.array([pending.count for pending in pendings], np.int32)
        ends = np.array([row.length - 1 for row in rows], np.int32)
        batch = self._batch(rows, ids, counts, ends)
        hidden = self._head.network.forward(batch, torch.cat([part for pending in pendings for part in pending.parts]))
        return hidden[np.cumsum(counts) - 1]

    @property
    def _kv(self) -> PagedKVCache:
        return self._head.network.cache

    def _advance(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        return self._head.network.forward(batch, hidden)

    def _scores(self, hidden: Tensor) -> Tensor:
        return self._head.network.logits(hidden)

    def _tokens(self, choices: Int32) -> Int32:
        return self._head.to_target[choices]

    def _position(self, row: DraftRow) -> int:
        return row.length - 1  # with the token at this place and the output before it


def _guessable(config: HeadConfig, tensors: Mapping[str, Tensor]) -> Int32:
    return layout.draft_tokens(config, tensors).numpy().astype(np.int32)
