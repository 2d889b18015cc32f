"""The runner's side of speculation: asks the drafters, keeps what they propose, and learns how often they are right."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slipstream.engine.errors import ConfigError, NoPlaceError
from slipstream.engine.faults import Faults
from slipstream.engine.messages import DrafterStats, VersionStats
from slipstream.engine.models.weights import Weights
from slipstream.engine.plan import FirstDraft, NewRow
from slipstream.engine.runner.acceptance import Acceptance, chances
from slipstream.engine.runner.row_drafts import RatedProposal, RowDrafts
from slipstream.engine.speculation.protocol import (
    Begun,
    Coming,
    Computed,
    Drafter,
    DraftHost,
    DraftRow,
    LearnedDrafter,
    Proposal,
)
from slipstream.engine.speculation.tree import Tree, affordable, depths, is_chain

Answer = TypeVar("Answer")
Chances = tuple[float, ...]
REMEMBERED = 8
"""Versions of a learned drafter that no route holds any more, of which it is still known how good they are."""
ENOUGH = 2.5
"""Accepted draft tokens to be expected with which no costly drafter is asked any more."""


class Speculator:
    """Asks the drafters, keeps the best proposal of each row of the runner's table, and learns acceptance.

    Drafting is optional: without drafters it does nothing, and where one fails, the request goes on without it.
    """

    def __init__(self, drafters: Sequence[Drafter], most: int) -> None:
        self.most = most if drafters else 0
        self._stats = {
            drafter.name: DrafterStats(drafter.name, accepted_per_position=[0] * most) for drafter in drafters
        }
        self._drafters = {drafter.name: drafter for drafter in drafters}
        self._learned = next((drafter for drafter in drafters if isinstance(drafter, LearnedDrafter)), None)
        self._acceptance: dict[tuple[str, int], Acceptance] = {}
        self._versions: dict[int, VersionStats] = {}
        """Statistics of the learned drafter's loaded versions, by version."""
        self.taps: tuple[int, ...] = ()
        """Layers of the target that drafters want to see, ascending."""
        self._watching: list[Drafter] = []
        self._beginning: list[Drafter] = []
        """Drafters that propose behind a step that nobody has read."""
        self._scratch_blocks, self._block_size = 0, 1
        self._vocab_size = 2**31
        self._faults = Faults()

    def attach(self, host: DraftHost) -> None:
        """Makes every drafter ready; raises ConfigError or ModelError if one does not fit the model."""
        self._scratch_blocks, self._block_size = host.scratch.count, host.block_size
        self._vocab_size = host.model.shape.vocab_size
        tapped: tuple[int, ...] = ()
        for drafter in self._drafters.values():
            if taps := drafter.taps(host.model):
                if tapped not in ((), taps):
                    raise ConfigError(f"{drafter.name} reads the layers {taps}, another drafter {tapped}")
                tapped = taps
                self._watching.append(drafter)
        self.taps = tapped
        for drafter in self._drafters.values():
            drafter.attach(host)
        self._beginning = [drafter for drafter in self._drafters.values() if drafter.begins]
        self._take_versions()

    def swap_loaded(self, route: str, version: int, path: str) -> bool:
        """See LearnedDrafter.swap_loaded."""
        drafter = self._require_learned()
        before = self._version_for(route)
        if not drafter.swap_loaded(route, version, path):
            return False
        self._swapped(drafter, version, before)
        return True

    def prepare_swap(self, route: str, version: int, path: str) -> Callable[[], None]:
        """See LearnedDrafter.prepare; the files are read in the calling thread."""
        drafter = self._require_learned()
        swap = drafter.prepare(route, version, path)

        def land() -> None:
            before = self._version_for(route)
            swap()
            self._swapped(drafter, version, before)

        return land

    def prepare_target(self, weights: Weights) -> Callable[[], None]:
        """Prepares every drafter for new weights of the target; one that fails goes on with what it has.

        See Drafter.prepare_target."""
        prepared = []
        for drafter in self._drafters.values():
            try:
                prepared.append((drafter, drafter.prepare_target(weights)))
            except Exception:
                self._faults.tell(f"drafter {drafter.name} before new weights", "it drafts with what it has")

        def land() -> None:
            for drafter, follow in prepared:
                try:
                    follow()
                except Exception:
                    self._faults.tell(f"drafter {drafter.name} after new weights", "it drafts with what it has")

        return land

    def _version_for(self, route: str) -> int:
        """The version that drafts for requests of this route now."""
        routes = self.learned_routes
        return routes.get(route, routes.get("", 0))

    def _swapped(self, drafter: LearnedDrafter, version: int, before: int) -> None:
        """A new version is expected to be as good as the one it replaces, until its draft tokens say otherwise.

        More trust would have every request verify many draft tokens at once, just to see: long steps, at the very
        moment of a swap. Versions that were known come back as they were known.
        """
        self._stats[drafter.name].swaps += 1
        known = self._acceptance.pop((drafter.name, version), None)
        if known is None and (replaced := self._acceptance.get((drafter.name, before))) is not None:
            known = Acceptance(drafter.num_evidence, self.most, replaced)
        if known is not None:
            self._acceptance[drafter.name, version] = known
        self._take_versions()

    def drop(self, route: str) -> None:
        """See LearnedDrafter.drop."""
        self._require_learned().drop(route)
        self._take_versions()

    def own_drafter(self, route: str) -> str:
        """A name for the version that drafts for this route alone; empty for a route that uses the shared one."""
        version = self._learned.routes.get(route) if self._learned is not None and route else None
        return "" if version is None else f"{route}/{version}"

    @property
    def learned_routes(self) -> Mapping[str, int]:
        """See LearnedDrafter.routes."""
        return self._require_learned().routes

    def _require_learned(self) -> LearnedDrafter:
        if self._learned is None:
            raise NoPlaceError(
                "this server runs no learned drafter: start it with --drafter FOLDER, or --drafter cold for one made "
                "of the model's own last layer"
            )
        return self._learned

    def _take_versions(self) -> None:
        """Follows a swap or a drop: counts go on for versions that stay, and end for those that are gone.

        What is known of the latest few is kept, in case one is gone back to.
        """
        drafter = self._learned
        if drafter is None:
            return
        loaded = set(drafter.routes.values())
        self._versions = {version: self._versions.get(version) or VersionStats(version) for version in sorted(loaded)}
        gone = [key for key in self._acceptance if key[0] == drafter.name and key[1] not in loaded]
        for key in gone[: max(len(gone) - REMEMBERED, 0)]:
            del self._acceptance[key]
        stats = self._stats[drafter.name]
        stats.routes, stats.versions = dict(drafter.routes), list(self._versions.values())
        stats.memory_bytes = drafter.memory_bytes

    def _acceptance_of(self, drafter: Drafter, version: int) -> Acceptance:
        """Acceptance of one version: a new one is neither trusted nor doubted for what another did."""
        found = self._acceptance.get((drafter.name, version))
        if found is None:
            found = self._acceptance[drafter.name, version] = Acceptance(drafter.num_evidence, self.most)
        return found

    def observe(self, entries: Sequence[Computed]) -> None:
        """What a step computed, as far as it is right."""
        for drafter in self._watching:
            self._show(drafter, [entry for entry in entries if drafter.name in entry.row.drafters])

    @property
    def drafters(self) -> Collection[Drafter]:
        return self._drafters.values()

    @property
    def names(self) -> list[str]:
        return list(self._drafters)

    @property
    def stats(self) -> list[DrafterStats]:
        """The counters themselves, which go on counting."""
        return list(self._stats.values())

    def enter(self, new: NewRow, tokens: NDArray[np.int32]) -> RowDrafts:
        """A request takes a row, with this token table."""
        request, num_prompt, length = new.request, len(new.request.prompt), len(new.tokens)
        names = frozenset(name for name in self._drafters if request.speculation.mode in ("auto", name))
        draft = DraftRow(new.slot, request.scope, num_prompt, tokens, length, names, request.route)
        draft.request_id, draft.traffic, draft.remember = request.request_id, request.traffic, request.remember
        draft.seed, draft.params = new.seed, request.params
        return RowDrafts(draft)

    def finish(self, row: RowDrafts, length: int) -> None:
        """The request in this row has ended with so many tokens."""
        row.draft.length = length
        for drafter in self._drafters.values():
            try:
                drafter.finish(row.draft)
            except Exception:
                self._faults.tell(f"the end of a request in drafter {drafter.name}", "it learned nothing from it")
        row.draft.memory.clear()  # the row stays as it is until somebody else takes it, perhaps for days

    def draft_tree(self, row: RowDrafts, most: int) -> Tree | None:
        """The first draft tokens of what is proposed for this row, at most so many; None if there are none."""
        if row.best is None:
            return None
        return Tree(row.best.tree.tokens[:most], row.best.tree.parents[:most])

    def verified(self, row: RowDrafts, drafted: int, sampled: Sequence[int]) -> FirstDraft | None:
        """``drafted`` draft tokens were verified, and the tokens ``sampled`` came of it.

        None unless a learned drafter had proposed them.
        """
        if row.best is None:
            return None
        proposal, row.best = row.best, None
        depth = self._learn(row, proposal, sampled)
        if drafted:
            accepted = len(sampled) - 1
            stats = self._stats[proposal.drafter]
            stats.drafts += 1
            stats.draft_tokens += drafted
            stats.accepted_tokens += accepted
            if version := self._versions.get(proposal.version):
                version.drafts += 1
                version.draft_tokens += drafted
                version.accepted_tokens += accepted
            for position in range(accepted):
                stats.accepted_per_position[position] += 1
        return FirstDraft(proposal.version, depth > 0) if proposal.version else None

    def _learn(self, row: RowDrafts, proposal: RatedProposal, sampled: Sequence[int]) -> int:
        """Holds draft tokens against the tokens that came at their places, also those that were not verified.

        Returns how many in a row were right.
        """
        seen: list[tuple[int, int, bool]] = []
        node: int | None = -1
        depth = 0
        for token in sampled:
            siblings = [i for i, parent in enumerate(proposal.tree.parents) if parent == node]
            if not siblings:
                break
            node = next((i for i in siblings if proposal.tree.tokens[i] == token), None)
            seen += [(proposal.evidence[i], proposal.positions[i], i == node) for i in siblings]
            row.own[proposal.drafter].observe(sum(proposal.rates[i] for i in siblings), node is not None)
            if node is None:
                break
            depth += 1
        self._acceptance_of(self._drafters[proposal.drafter], proposal.version).observe(seen)
        return depth

    @property
    def begins(self) -> bool:
        """Whether ``begin`` may begin something."""
        return bool(self._beginning)

    @property
    def beginning(self) -> frozenset[str]:
        """Names of drafters that ``begin``."""
        return frozenset(drafter.name for drafter in self._beginning)

    def begin(self, coming: Sequence[Coming]) -> list[Begun]:
        """What drafters will have proposed behind a step that is about to be launched."""
        begun: list[Begun] = []
        for drafter in self._beginning:
            try:
                begun += drafter.begin([each for each in coming if drafter.name in each.row.drafters])
            except Exception:
                self._faults.tell(f"drafter {drafter.name} before a step", "it drafts after it")
        return begun

    def follow(
        self, begun: Begun, columns: Sequence[Tensor], features: Tensor | None, samples: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """See ``Begun.launch``; None where it failed, and its rows go on without draft tokens."""
        try:
            assert features is not None, "drafters that begin see what the model computes"
            return begun.launch(columns, features, samples)
        except Exception:
            self._faults.tell("drafting behind a step", "its requests go on without draft tokens")
            return None

    def propose(self, rows: Sequence[RowDrafts], wanted: Sequence[int], costly: Sequence[int]) -> list[Chances]:
        """Returns the falling chances of the draft tokens that are now kept for each row; empty where there are none.

        ``wanted`` of each row at most, and ``costly`` by drafters that are costly to ask; 0: they are not asked for it.
        """
        if not self._drafters:
            return [()] * len(rows)
        values = np.zeros(len(rows))
        for row in rows:
            row.best = None
        for drafter in self._drafters.values():
            for row, most in zip(rows, costly if drafter.needs.costly else wanted, strict=True):
                row.draft.most = min(most, self.most)
            asked = [
                i
                for i, row in enumerate(rows)
                if row.draft.most
                and drafter.name in row.draft.drafters
                and not (drafter.needs.costly and values[i] >= ENOUGH)
            ]
            if not asked:
                continue
            for i, proposal in zip(asked, self._ask(drafter, [rows[i].draft for i in asked]), strict=True):
                if proposal is None or not proposal.tokens:
                    continue
                rated = self._rate(rows[i], drafter.name, proposal)
                if (constraint := rows[i].constraint) is not None:  # what it forbids would be verified in vain
                    rated = rated.take(constraint.permitted(rated.tree))
                value = sum(rated.chances)
                if value > values[i]:
                    values[i], rows[i].best = value, rated
        self._cut_branches(rows)
        return [tuple(row.best.chances) if row.best else () for row in rows]

    def _show(self, drafter: Drafter, entries: Sequence[Computed]) -> None:
        def show(places: Sequence[int]) -> Sequence[None]:
            drafter.observe([entries[place] for place in places])
            return [None] * len(places)

        self._apart(drafter, [entry.row for entry in entries], show)

    def _ask(self, drafter: Drafter, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        def ask(places: Sequence[int]) -> Sequence[Proposal | None]:
            proposals = drafter.propose([rows[place] for place in places])
            for place, proposal in zip(places, proposals, strict=True):
                if proposal is not None:
                    proposal.check(rows[place].most, self._vocab_size, drafter.num_evidence)
            return proposals

        return self._apart(drafter, rows, ask)

    def _apart(
        self, drafter: Drafter, rows: Sequence[DraftRow], call: Callable[[Sequence[int]], Sequence[Answer]]
    ) -> list[Answer | None]:
        """What ``call`` returns for all places in ``rows`` at once or, where it raises, for one after the other.

        The row that raises then goes on without the drafter, for as long as its request runs.
        """
        with suppress(Exception):
            return list(call(range(len(rows)))) if rows else []
        found: list[Answer | None] = []
        for place, row in enumerate(rows):
            try:
                found += call([place])
            except Exception:
                found.append(None)
                row.drafters -= {drafter.name}
                self._faults.tell(f"drafter {drafter.name}", "the request goes on without it")
        return found

    def _rate(self, row: RowDrafts, drafter: str, proposal: Proposal) -> RatedProposal:
        """A proposal with its chances, in their order: the first n draft tokens are the most promising tree of n."""
        tree, positions = Tree(proposal.tokens, proposal.parents), depths(proposal.parents)
        rates = self._acceptance_of(self._drafters[drafter], proposal.version).rates(proposal.evidence, positions)
        found = chances(rates, proposal.parents, row.own[drafter].factor())
        rated = RatedProposal(drafter, proposal.version, tree, proposal.evidence, positions, rates, found)
        return rated.take(sorted(range(len(found)), key=lambda node: -found[node]))

    def _cut_branches(self, rows: Sequence[RowDrafts]) -> None:
        """Leaves out branches for which there are too few scratch blocks; every row gets the same share of them."""
        left = self._scratch_blocks
        for at, row in enumerate(rows):
            if row.best is not None and not is_chain(row.best.tree.parents):
                share = left // (len(rows) - at)
                nodes, used = affordable(row.best.tree.parents, row.draft.length, self._block_size, share)
                row.best = row.best.take(nodes)
                left -= used
