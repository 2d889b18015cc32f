"""The runner's side of speculation: asks the drafters, keeps what they propose, and learns how often they are right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slipstream.engine.errors import ConfigError
from slipstream.engine.messages import DrafterStats, VersionStats
from slipstream.engine.plan import NewRow
from slipstream.engine.speculation.acceptance import Acceptance, OwnAcceptance, chances
from slipstream.engine.speculation.protocol import (
    Computed,
    Drafter,
    DraftHost,
    DraftRow,
    LearnedDrafter,
    Listener,
    Proposal,
)

ENOUGH = 2.5
"""Right guesses to be expected with which no costly drafter is asked any more."""


class _Row:
    __slots__ = ("best", "draft", "own", "rates")

    def __init__(self, draft: DraftRow) -> None:
        self.draft = draft
        self.own = {name: OwnAcceptance() for name in draft.drafters}
        self.best: tuple[Drafter, Proposal] | None = None
        self.rates: list[float] = []


class Speculator:
    """Holds one row per running request, like the runner; without drafters it does nothing."""

    def __init__(self, drafters: Sequence[Drafter], most: int, listeners: Sequence[Listener] = ()) -> None:
        self.most = most if drafters else 0
        self._stats = {
            drafter.name: DrafterStats(drafter.name, accepted_per_position=[0] * most) for drafter in drafters
        }
        self._drafters = {drafter.name: drafter for drafter in drafters}
        self._learned = next((drafter for drafter in drafters if isinstance(drafter, LearnedDrafter)), None)
        self._acceptance: dict[tuple[str, int], Acceptance] = {}
        self._versions: dict[int, VersionStats] = {}
        """Of the learned drafter's loaded versions."""
        self._rows: dict[int, _Row] = {}
        self._watching: list[Drafter] = []
        self._listeners = listeners
        self._listening: list[Listener] = []

    def attach(self, host: DraftHost) -> None:
        """Makes every drafter ready; raises ConfigError or ModelError if one does not fit the model."""
        tapped: tuple[int, ...] = ()
        for drafter in self._drafters.values():
            if taps := drafter.taps(host.model):
                if tapped not in ((), taps):
                    raise ConfigError(f"{drafter.name} reads the layers {taps}, another drafter {tapped}")
                tapped = taps
                self._watching.append(drafter)
        for listener in self._listeners:
            if taps := listener.taps(host.model, tapped):
                assert tapped in ((), taps), "all who watch see the same layers"
                tapped = taps
                self._listening.append(listener)
        if tapped:
            host.model.tap(tapped)
        for drafter in self._drafters.values():
            drafter.attach(host)
        self._take_versions()

    def prepare_swap(self, route: str, version: int, path: str) -> Callable[[], None]:
        """As LearnedDrafter.prepare; the files are read in the calling thread."""
        drafter = self._require_learned()
        swap = drafter.prepare(route, version, path)

        def land() -> None:
            swap()
            self._stats[drafter.name].swaps += 1
            self._take_versions()

        return land

    def drop(self, route: str) -> None:
        """As LearnedDrafter.drop."""
        self._require_learned().drop(route)
        self._take_versions()

    def _require_learned(self) -> LearnedDrafter:
        if self._learned is None:
            raise ConfigError(
                "this server runs no learned drafter: start it with --drafter FOLDER, or --drafter cold for one made "
                "of the model's own last layer"
            )
        return self._learned

    def _take_versions(self) -> None:
        """After a swap or a drop: counts go on for versions that stay, and end for those that are gone."""
        drafter = self._learned
        if drafter is None:
            return
        loaded = set(drafter.routes.values())
        self._versions = {version: self._versions.get(version) or VersionStats(version) for version in sorted(loaded)}
        self._acceptance = {
            key: value for key, value in self._acceptance.items() if key[0] != drafter.name or key[1] in loaded
        }
        stats = self._stats[drafter.name]
        stats.routes, stats.versions = dict(drafter.routes), list(self._versions.values())
        stats.memory_bytes = drafter.memory_bytes

    def _acceptance_of(self, drafter: Drafter, version: int) -> Acceptance:
        """Apart for each version: a new one is neither trusted nor doubted for what another did."""
        found = self._acceptance.get((drafter.name, version))
        if found is None:
            found = self._acceptance[drafter.name, version] = Acceptance(drafter.num_evidence, self.most)
        return found

    @property
    def watches(self) -> bool:
        """Whether anybody wants to see what the target computes."""
        return bool(self._watching or self._listening)

    def top_k(self, slots: Iterable[int]) -> int:
        """How many of the most likely tokens listeners want to see of one of these rows."""
        most = max((listener.top_k for listener in self._listening), default=0)
        return most if most and any(self._rows[slot].draft.traffic == "features" for slot in slots) else 0

    def observe(self, computed: Iterable[tuple[int, int, Tensor, tuple[Tensor, Tensor] | None]]) -> None:
        """(slot, first position, features, most likely tokens) of what a step computed, as far as it is right."""
        entries = [Computed(self._rows[slot].draft, start, features, top) for slot, start, features, top in computed]
        for drafter in self._watching:
            drafter.observe([entry for entry in entries if drafter.name in entry.row.drafters])
        if self._listening and (kept := [entry for entry in entries if entry.row.traffic == "features"]):
            for listener in self._listening:
                listener.observe(kept)

    @property
    def names(self) -> list[str]:
        return list(self._drafters)

    @property
    def stats(self) -> list[DrafterStats]:
        """The counters themselves, which go on counting."""
        return list(self._stats.values())

    def enter(self, new: NewRow, tokens: NDArray[np.int32]) -> None:
        """A request takes a row, with this token table; whoever had it before was preempted or has ended."""
        mode = new.speculation.mode
        names = [name for name in self._drafters if mode in ("auto", name)]
        draft = DraftRow(new.slot, new.scope, new.num_prompt, tokens, len(new.tokens), frozenset(names), new.route)
        draft.request_id, draft.traffic = new.request_id, new.traffic
        self._rows[new.slot] = _Row(draft)

    def finish(self, slot: int) -> None:
        """The request in this row has ended."""
        row = self._rows.pop(slot)
        for drafter in self._drafters.values():
            drafter.finish(row.draft)

    def versions(self, slots: Sequence[int], drafted: Sequence[int]) -> dict[int, int]:
        """By place in ``slots``: the version of a learned drafter whose guesses this step verifies."""
        found: dict[int, int] = {}
        for row, (slot, count) in enumerate(zip(slots, drafted, strict=True)):
            best = self._rows[slot].best if count else None
            if best is not None and best[1].version:
                found[row] = best[1].version
        return found

    def guesses(self, slot: int, count: int) -> list[int]:
        """The first tokens of what is proposed for this row."""
        best = self._rows[slot].best
        assert best is not None and len(best[1].tokens) >= count, "more guesses to verify than were proposed"
        return best[1].tokens[:count]

    def verified(self, slot: int, drafted: int, drawn: Sequence[int], length: int) -> None:
        """``drafted`` guesses were verified, the tokens ``drawn`` came of it, and ``length`` are known now."""
        row = self._rows[slot]
        row.draft.length = length
        if row.best is None:
            return
        drafter, proposal = row.best
        # A guess that was not verified can still be held against the token that came instead of it.
        tried = max(drafted, 1)
        right = 0
        while right < min(tried, len(drawn)) and proposal.tokens[right] == drawn[right]:
            right += 1
        self._acceptance_of(drafter, proposal.version).observe(proposal.evidence, tried, right)
        row.own[drafter.name].observe(row.rates[:tried], right)
        row.best = None
        if drafted:
            stats = self._stats[drafter.name]
            stats.drafts += 1
            stats.draft_tokens += drafted
            stats.accepted_tokens += right
            if drafter is self._learned and (version := self._versions.get(proposal.version)):
                version.drafts += 1
                version.draft_tokens += drafted
                version.accepted_tokens += right
            for position in range(right):
                stats.accepted_per_position[position] += 1

    def propose(self, slots: Sequence[int], wanted: Sequence[int], mapped: Sequence[int]) -> list[tuple[float, ...]]:
        """Per row, the chances of the guesses that are now kept for it; empty where there are none."""
        if not self._drafters:
            return [()] * len(slots)
        rows = [self._rows[slot] for slot in slots]
        for row, most, positions in zip(rows, wanted, mapped, strict=True):
            row.best = None
            row.draft.mapped = positions
            row.draft.most = min(most, self.most)
        offers: list[tuple[float, ...]] = [()] * len(rows)
        values = np.zeros(len(rows))
        for drafter in self._drafters.values():
            asked = [
                i
                for i, row in enumerate(rows)
                if row.draft.most
                and drafter.name in row.draft.drafters
                and not (drafter.costly and values[i] >= ENOUGH)
            ]
            if not asked:
                continue
            for i, proposal in zip(asked, drafter.propose([rows[i].draft for i in asked]), strict=True):
                if proposal is None or not proposal.tokens:
                    continue
                row = rows[i]
                acceptance = self._acceptance_of(drafter, proposal.version)
                rates = acceptance.rates(proposal.evidence, len(proposal.tokens))
                offer = chances(rates, row.own[drafter.name].factor())
                value = sum(offer)
                if value > values[i]:
                    values[i], offers[i] = value, tuple(offer)
                    row.best, row.rates = (drafter, proposal), rates
        return offers
