"""Drafts with an EAGLE-3 head: one small layer that continues the target's own features."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slipstream.drafter.autoregressive import AutoregressiveDrafter, last_of
from slipstream.drafter.choosing import Choice
from slipstream.drafter.head import layout
from slipstream.drafter.head.ahead import Ahead, Shown
from slipstream.drafter.head.layout import HeadConfig
from slipstream.drafter.head.network import HeadNetwork, HeadWeights
from slipstream.drafter.head.pending import LOOSE, Pending
from slipstream.engine.errors import ConfigError, MisfitError, ModelError, NoPlaceError
from slipstream.engine.models.config import DecoderConfig
from slipstream.engine.models.decoder import DecoderWeights
from slipstream.engine.models.loader import SPARE_BYTES, available_memory
from slipstream.engine.models.protocol import CausalModel, DecoderModel
from slipstream.engine.models.weights import Weights
from slipstream.engine.speculation.protocol import Coming, Computed, DraftHost, DraftRow, LearnedDrafter, Proposal
from slipstream.engine.units import human_size
from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.host_chains import HostChains, MadeChains
from slipstream.kernels.kv_cache import PagedKVCache

SHARED = ""
"""The route for every request whose own holds nothing."""


@dataclass(frozen=True, slots=True)
class FirstHead:
    """The head that a drafter begins with."""

    config: HeadConfig
    tensors: Mapping[str, Tensor]
    """An output matrix that is the target's own rows may be left out."""
    version: int = 1
    path: str = ""
    """Where it was read, if it may be swapped in again from there."""


Load = Callable[[DecoderConfig], FirstHead]
"""Reads or makes a head for a target."""
Read = Callable[[Path, DecoderConfig], tuple[HeadConfig, Mapping[str, Tensor]]]
"""Reads the head in a folder, as FirstHead has it; raises ModelError if it is damaged or for another target."""


@dataclass(frozen=True, slots=True, eq=False)
class _Version:
    """One that is in memory, ready to draft."""

    version: int
    path: str
    weights: HeadWeights
    to_target: Tensor
    """[draft vocabulary] int32, where the target computes: the target's tokens."""


class HeadDrafter(AutoregressiveDrafter, LearnedDrafter):
    """Position p of the head holds the features of position p and token p + 1, and predicts token p + 2.

    The features of accepted tokens are the target's own; while drafting, the head's output stands in for them.

    Each route has a network of its own, with keys and values of its own. What a request has there from before a swap,
    or lacks because its route was empty until now, costs acceptance only. Weights belong to versions, not to routes:
    there is memory for two per route, and what is not in use stays until that is needed. So going back to the version
    before, or making the one on trial that of all requests, reads and copies nothing.
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
        self._target: DecoderModel
        self._first: FirstHead | None = None
        self._networks: dict[str, HeadNetwork] = {}
        self._held: dict[str, _Version] = {}
        """The version that each route holds."""
        self._kept: list[_Version] = []
        """Versions in memory that no route holds; what was held last comes last."""
        self._memory = threading.Lock()
        """Around what is kept: versions are prepared in another thread than steps run in."""
        self._network: HeadNetwork
        self._version: _Version
        """The ones that draft at the moment."""

    def taps(self, model: CausalModel) -> tuple[int, ...]:
        if (target := model.decoder) is None:
            raise ConfigError(
                f"a head reads hidden states, which {model.shape.model_type} models, run through transformers, do not "
                "show; use --speculation ngram,suffix"
            )
        self._target = target
        self._first = self._load(target.config)
        self._config = self._first.config
        layout.check_target(self._config, target.config)
        compute = target.compute.for_drafts
        if not compute.supports(self._config.layer_shape(target.config), compute.device):
            raise ModelError(
                f"its sizes (heads of {self._config.head_dim}, an MLP of {self._config.intermediate}) are none "
                f"that the {compute.name} kernels of the model compute; use --kernels torch"
            )
        return self._config.taps

    def attach(self, host: DraftHost) -> None:
        super().attach(host)
        first, self._first = self._first, None
        assert first is not None, "taps comes first"
        self._network, weights = self._make_network(), HeadWeights(first.config, self._target)
        self._version = self._fill(weights, first)
        self._hold(SHARED, self._network, self._version)

    @property
    def routes(self) -> Mapping[str, int]:
        return {route: held.version for route, held in self._held.items()}

    @property
    def memory_bytes(self) -> int:
        """Weights and caches, with the room for two versions per route, whether it is filled or not."""
        return len(self._networks) * self._route_bytes

    @property
    def _route_bytes(self) -> int:
        return 2 * self._version.weights.memory_bytes + self._networks[SHARED].cache.num_bytes

    def swap_loaded(self, route: str, version: int, path: str) -> bool:
        network = self._networks.get(route)
        loaded = self._find(version, path)
        if network is None or loaded is None:
            return False
        self._hold(route, network, loaded)
        return True

    def prepare(self, route: str, version: int, path: str) -> Callable[[], None]:
        if version < 1:
            raise ConfigError(f"a drafter's version is a number from 1 on, not {version}")
        network = self._networks.get(route)
        if network is None and len(self._networks) >= self._most:
            raise NoPlaceError(
                f"{len(self._networks)} drafters are loaded (routes {', '.join(map(repr, self._networks))}): drop one, "
                "or start the server with more --max-drafters"
            )
        ready = self._find(version, path) or self._load_version(version, path, is_new=network is None)
        network = network or self._new_network()
        return lambda: self._hold(route, network, ready)

    def prepare_target(self, weights: Weights) -> Callable[[], None]:
        """Copies of the target's rows, with which heads draft, become those of the new output matrix."""
        assert isinstance(weights, DecoderWeights)
        outputs, made = [], {}
        for version in {id(each): each for each in self._loaded()}.values():
            before = id(version.weights.output)  # which versions may share
            if before not in made:
                made[before] = version.weights.output_from(version.to_target, weights.output)
            outputs.append((version.weights, made[before]))

        def land() -> None:
            for head, output in outputs:
                if output is not None:
                    head.output = output
            for route, held in self._held.items():
                self._networks[route].use(held.weights)

        return land

    def forget_target(self) -> None:
        for network in self._networks.values():
            network.forget()

    @property
    def caches(self) -> Sequence[PagedKVCache]:
        return [network.cache for network in self._networks.values()]

    def _find(self, version: int, path: str) -> _Version | None:
        """The files of a version never change, so one that is in memory need not be read again."""
        return next((each for each in self._loaded() if (each.version, each.path) == (version, path)), None)

    def _loaded(self) -> tuple[_Version, ...]:
        """All in memory; one that several routes hold comes as often."""
        with self._memory:
            return (*self._held.values(), *self._kept)

    def _load_version(self, version: int, path: str, is_new: bool) -> _Version:
        """``is_new``: for a route that comes with memory of its own."""
        config, tensors = self._read(Path(path), self._target.config)
        self._require_same_sizes(config)
        weights = (None if is_new else self._free_weights()) or HeadWeights(self._config, self._target)
        return self._fill(weights, FirstHead(config, tensors, version, path))

    def _fill(self, weights: HeadWeights, head: FirstHead) -> _Version:
        tokens = layout.draft_tokens(head.config, head.tensors).to(self._target.compute.device)
        to_target = tokens.int()
        alike = (
            each.weights for each in self._loaded() if each.weights.follows and torch.equal(each.to_target, to_target)
        )
        weights.fill(head.tensors, tokens, next(alike, None))
        return _Version(head.version, head.path, weights, to_target)

    def _free_weights(self) -> HeadWeights | None:
        """Weights of the version that has not been held for longest, if there is no memory for another one."""
        with self._memory:
            return self._kept.pop(0).weights if self._kept and self._room < 1 else None

    @property
    def _room(self) -> int:
        """How many more versions there is memory for."""
        return 2 * len(self._networks) - len(set(map(id, self._held.values()))) - len(self._kept)

    def _hold(self, route: str, network: HeadNetwork, version: _Version) -> None:
        network.use(version.weights)
        with self._memory:
            before = self._held.get(route)
            self._networks[route], self._held[route] = network, version
            self._keep(before)

    def drop(self, route: str) -> None:
        if route not in self._held:
            raise ConfigError(
                f"route {route!r} holds no drafter; loaded are the routes {', '.join(map(repr, self._held)) or 'none'}"
            )
        with self._memory:
            if route != SHARED:
                del self._networks[route]
            self._keep(self._held.pop(route))

    def _keep(self, released: _Version | None) -> None:
        """Keeps the weights of a released version while there is memory: two versions per route."""
        held = set(map(id, self._held.values()))
        self._kept = [each for each in (*self._kept, released) if each is not None and id(each) not in held]
        del self._kept[: max(-self._room, 0)]

    def _new_network(self) -> HeadNetwork:
        """A network for one more route; raises NoPlaceError if there is no memory for it."""
        needed, free = self._route_bytes, available_memory(self._target.compute.device)
        if free < needed + SPARE_BYTES:
            raise NoPlaceError(
                f"one more drafter takes {human_size(needed)}, and only {human_size(free)} of memory are free: drop one"
            )
        return self._make_network()

    def _make_network(self) -> HeadNetwork:
        host = self._host
        max_length = host.block_tables.shape[1] * host.block_size
        return HeadNetwork(self._config, self._target, host.num_blocks, host.block_size, max_length)

    def _require_same_sizes(self, config: HeadConfig) -> None:
        """Networks are built once, and the target shows the layers it was asked for at the start."""
        for field in fields(HeadConfig):
            ours, theirs = getattr(self._config, field.name), getattr(config, field.name)
            if ours != theirs and field.name != "max_positions":
                raise MisfitError(
                    f"the drafter does not fit the running one: its {field.name} is {theirs}, the running one's "
                    f"{ours}; an engine that starts with it takes it"
                )

    def _by_route(self, rows: Sequence[DraftRow]) -> Iterator[list[int]]:
        """Places of rows that share a head, which drafts meanwhile; not of those that have none."""
        places: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row.route if row.route in self._held else SHARED, []).append(place)
        for route, some in places.items():
            if route in self._held:
                self._network, self._version = self._networks[route], self._held[route]
                yield some

    @property
    def begins(self) -> bool:
        return self._width == 1 and self._network.makes_chains

    def begin(self, coming: Sequence[Coming]) -> Sequence[Ahead]:
        return [
            ahead
            for places in self._by_route([each.row for each in coming])
            if (ahead := self._begin([coming[place] for place in places])) is not None
        ]

    def _begin(self, coming: Sequence[Coming]) -> Ahead | None:
        """Not for a request whose length nobody knows, as a step before this one is yet to be read."""
        known = [each for each in coming if each.is_late or each.row.length == each.start + each.known]
        if not known:
            return None
        waiting = [self._waiting(each) for each in known]
        choice = Choice(self._version.to_target, any(each.row.params.temperature > 0 for each in known))
        version, host = self._version.version, self._host
        ahead = Ahead.of(known, waiting, self._network, version, choice, self._stop_below, host)
        if ahead is not None:
            for place, each in enumerate(known):
                shown = each.row.memory.get(self.name)
                if not isinstance(shown, deque):
                    shown = each.row.memory[self.name] = deque()
                shown.append(Shown(ahead, place))
        return ahead

    def _waiting(self, coming: Coming) -> Pending:
        """What the head has not seen of a row before a step."""
        pending = coming.row.memory.get(self.name)
        if isinstance(pending, Pending) and pending.start + pending.count == coming.start:
            return pending
        return Pending(coming.start, self._target.formats.compute)

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        proposals: list[Proposal | None] = [None] * len(rows)
        others: list[int] = []
        for place, row in enumerate(rows):
            if isinstance(shown := row.memory.get(self.name), deque) and shown and shown[0].is_over:
                proposals[place] = shown.popleft().proposal(row)
            else:
                others.append(place)
        for places in self._by_route([rows[place] for place in others]):
            some = [others[place] for place in places]
            for place, proposal in zip(some, super().propose([rows[place] for place in some]), strict=True):
                proposals[place] = proposal and replace(proposal, version=self._version.version)
        return proposals

    def observe(self, computed: Sequence[Computed]) -> None:
        # A piece keeps all memory of what it is cut from: some tokens' must not keep a whole prompt's.
        is_large = any(len(entry.rows) > LOOSE for entry in computed)
        for entry in computed:
            pending = entry.row.memory.get(self.name)
            if isinstance(pending, deque):  # of steps that it may have seen by itself, in their order
                while pending and pending[0].is_over:
                    pending.popleft()
                if pending:
                    pending[0].is_over = True
                    continue
            if not (isinstance(pending, Pending) and pending.start + pending.count == entry.start):
                pending = entry.row.memory[self.name] = Pending(entry.start, self._target.formats.compute)
            pending.add(entry)
            if is_large:
                pending.pack()

    def _is_ready(self, row: DraftRow) -> bool:
        """Whether the features up to the last but one token, after which the next draft token comes, are at hand."""
        pending = row.memory.get(self.name)
        return isinstance(pending, Pending) and pending.start + pending.count == row.length - 1

    def _catch_up(self, rows: Sequence[DraftRow]) -> Tensor:
        """Shows the head what the target computed since it was asked last; its output at the last positions."""
        pendings = []
        for row in rows:
            pending = row.memory.pop(self.name)
            assert isinstance(pending, Pending)
            pendings.append(pending)
        features = torch.cat([part for pending in pendings for part in pending.parts()])
        ids = np.concatenate([row.known[pending.start + 1 :] for row, pending in zip(rows, pendings, strict=True)])
        counts = np.array([pending.count for pending in pendings], np.int32)
        ends = np.array([row.length - 1 for row in rows], np.int32)
        # Which of them are last travels with the batch: to a GPU a copy of its own would take longer than what it says.
        batch = self._batch(rows, ids, counts, ends, (last_of(counts),))
        return self._network.forward(batch, self._network.fuse(features))

    @property
    def _kv(self) -> PagedKVCache:
        return self._network.cache

    def _advance(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        return self._network.forward(batch, hidden)

    def _at_once(self, asked: HostChains, hidden: Tensor) -> MadeChains | None:
        return self._network.draft(asked, hidden)

    def _scores(self, hidden: Tensor) -> Tensor:
        return self._network.logits(hidden)

    @property
    def _vocabulary(self) -> Tensor | None:
        return self._version.to_target

    def _position(self, row: DraftRow) -> int:
        return row.length - 1  # with the token at this place and the output before it
