"""The runner's side alone: who is asked, whose proposal is taken, and what is learned from what became of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from slipstream.drafter.lookup import NGramDrafter
from slipstream.engine.messages import NewRequest, SamplingParams, SpeculationParams
from slipstream.engine.plan import NewRow
from slipstream.engine.runner.row_drafts import RowDrafts
from slipstream.engine.runner.speculator import ENOUGH, Speculator
from slipstream.engine.speculation.protocol import Drafter, DraftHost, DraftNeeds, DraftRow, LearnedDrafter, Proposal
from slipstream.engine.speculation.scratch import Scratch
from slipstream.engine.speculation.tree import Tree


class Always(Drafter):
    """Proposes the same token everywhere."""

    num_evidence = 1

    def __init__(self, name: str, token: int, count: int = 8, costly: bool = False) -> None:
        self.name, self.needs = name, DraftNeeds(costly=costly)
        self._tokens = [token] * count
        self.asked = 0

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        self.asked += len(rows)
        return [Proposal.chain(self._tokens[: row.most], 0) for row in rows]


class Alone:
    """A speculator with one running request, of which 200 positions are mapped."""

    def __init__(self, *drafters: Drafter, mode: str = "auto") -> None:
        self.speculator = Speculator(drafters, 8)
        request = NewRequest(
            request_id=1,
            prompt=[1, 2, 3],
            params=SamplingParams(max_tokens=100),
            speculation=SpeculationParams(mode),
        )
        self.row: RowDrafts = self.speculator.enter(NewRow(0, request, [1, 2, 3], 0), np.zeros(200, np.int32))
        self.row.draft.mapped = 200

    def propose(self, most: int = 8) -> tuple[float, ...]:
        [offer] = self.speculator.propose([self.row], [most], [most])
        return offer

    def draft_tree(self, count: int) -> Tree:
        tree = self.speculator.draft_tree(self.row, count)
        assert tree is not None
        return tree

    def verified(self, drafted: int, sampled: Sequence[int], length: int) -> tuple[int, bool] | None:
        self.row.draft.length = length
        return self.speculator.verified(self.row, drafted, sampled)


def play(made: Alone, truth: int, steps: int, drafted: int) -> None:
    """So many steps in which the model always says ``truth``."""
    length = 3
    for _ in range(steps):
        count = min(drafted, len(made.propose()))
        drafts = made.draft_tree(count).tokens if count else []
        right = 0
        while right < count and drafts[right] == truth:
            right += 1
        length = 3 + (length + right) % 100
        made.verified(count, [truth] * (right + 1), length)


def test_the_drafter_that_is_right_wins() -> None:
    wrong, right = Always("wrong", 5), Always("right", 7)
    made = Alone(wrong, right)
    play(made, 7, 30, drafted=3)
    assert made.propose()[0] > 0.9
    assert made.draft_tree(2).tokens == [7, 7]
    stats = {entry.name: entry for entry in made.speculator.stats}
    assert stats["right"].accepted_tokens == stats["right"].draft_tokens > 60
    assert stats["right"].accepted_per_position[:3] == [stats["right"].drafts] * 3


class Branching(Drafter):
    """Two draft tokens at each of two places: 7 or 8, then 7 or 8 after 7. The second ones are better founded."""

    name, num_evidence = "branching", 2

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        return [Proposal([7, 8, 7, 8], [-1, -1, 0, 0], [0, 1, 0, 1]) for _ in rows]


def host(scratch_blocks: int) -> DraftHost:
    tables = np.zeros((1 + scratch_blocks, 20), np.int32)
    scratch = Scratch(tables, 20, scratch_blocks, 16)
    return DraftHost(SimpleNamespace(shape=SimpleNamespace(vocab_size=9)), tables, 20 + scratch_blocks, 16, scratch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scratch_blocks", "tokens", "parents"),
    [(8, [8, 7, 8, 7], [-1, -1, 1, 1]), (1, [8, 7, 8], [-1, -1, 1]), (0, [8], [-1])],
)
def test_drafts_are_offered_in_the_order_of_their_chances(
    scratch_blocks: int, tokens: list[int], parents: list[int]
) -> None:
    made = Alone(Branching())
    made.speculator.attach(host(scratch_blocks))
    offer = made.propose()
    assert list(offer) == sorted(offer, reverse=True)
    tree = made.draft_tree(len(offer))
    assert (tree.tokens, tree.parents) == (tokens, parents)


def test_branches_learn_apart() -> None:
    made = Alone(Branching())
    made.speculator.attach(host(8))
    play(made, 7, 40, drafted=0)
    assert made.propose()[0] > 0.8
    tree = made.draft_tree(4)
    assert tree.tokens == [7, 7, 8, 8]
    assert tree.parents[:2] == [-1, 0]


def test_drafts_that_are_not_verified_teach_too() -> None:
    made = Alone(Always("wrong", 5))
    before = made.propose()[0]
    play(made, 7, 50, drafted=0)
    assert made.propose()[0] < before / 4
    assert made.speculator.stats[0].drafts == 0


def test_costly_drafters_are_asked_where_cheap_ones_promise_little() -> None:
    cheap, costly = Always("cheap", 7), Always("costly", 5, costly=True)
    made = Alone(cheap, costly)
    play(made, 7, 30, drafted=8)
    asked = costly.asked
    assert sum(made.propose()) >= ENOUGH
    assert costly.asked == asked
    play(made, 5, 100, drafted=2)
    assert costly.asked > asked
    assert made.propose() and made.draft_tree(1).tokens == [5]


@pytest.mark.parametrize(("mode", "expected"), [("off", []), ("one", [7]), ("two", [5])])
def test_a_request_is_served_by_the_drafters_it_names(mode: str, expected: list[int]) -> None:
    made = Alone(Always("one", 7), Always("two", 5), mode=mode)
    offer = made.propose(1)
    assert (made.draft_tree(1).tokens if offer else []) == expected


class Learned(Always, LearnedDrafter):
    """Always, with a token per version; the path is the token."""

    def __init__(self) -> None:
        super().__init__("learned", 5)
        self.held = {"": (1, 5)}

    @property
    def routes(self) -> dict[str, int]:
        return {route: version for route, (version, _) in self.held.items()}

    @property
    def memory_bytes(self) -> int:
        return 1000 * len(self.held)

    def swap_loaded(self, route: str, version: int, path: str) -> bool:
        return False

    def prepare(self, route: str, version: int, path: str) -> Callable[[], None]:
        return lambda: self.held.update({route: (version, int(path))})

    def drop(self, route: str) -> None:
        del self.held[route]

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        held = [self.held.get(row.route, self.held[""]) for row in rows]
        return [
            Proposal.chain([token] * row.most, 0, version) for row, (version, token) in zip(rows, held, strict=True)
        ]


def test_acceptance_and_counts_are_apart_for_each_version() -> None:
    drafter = Learned()
    made = Alone(drafter)
    made.speculator.prepare_swap("", 1, "5")()
    play(made, 7, 60, drafted=1)
    wrong = made.propose()[0]
    [stats] = made.speculator.stats
    assert made.verified(0, [5], 4) == (1, True) and made.verified(0, [5], 5) is None
    made.propose()
    assert [(entry.version, entry.drafts, entry.accepted_tokens) for entry in stats.versions] == [(1, 60, 0)]

    made.speculator.prepare_swap("", 2, "7")()
    assert made.verified(0, [7], 6) == (1, False), "what was proposed before the swap is the old version's"
    assert made.propose()[0] < 0.2, "it is expected to be as good as the one before"
    assert made.verified(0, [7], 7) == (2, True)
    play(made, 7, 20, drafted=2)
    assert made.propose()[0] > 0.5 > wrong, "and soon known for what it is"
    assert [(entry.version, entry.drafts, entry.accepted_tokens) for entry in stats.versions] == [(2, 20, 40)]
    assert (stats.drafts, stats.swaps, stats.routes, stats.memory_bytes) == (80, 2, {"": 2}, 1000)

    right = made.propose()[0]
    for version in (1, 2):
        made.speculator.prepare_swap("", version, {1: "5", 2: "7"}[version])()
        assert (made.propose()[0] > right / 2) == (version == 2), "what was known of it is known still"
    play(made, 7, 3, drafted=2)
    made.speculator.prepare_swap("canary", 3, "1")()
    assert stats.routes == {"": 2, "canary": 3} and [entry.version for entry in stats.versions] == [2, 3]
    assert stats.versions[0].drafts == 3, "counts are of the time since it went live"
    made.speculator.drop("canary")
    assert stats.routes == {"": 2} and [entry.version for entry in stats.versions] == [2]


def test_what_drafters_keep_of_a_request_goes_when_it_ends() -> None:
    """Its row may stay as it is for long."""
    alone = Alone(NGramDrafter())
    alone.propose()
    assert alone.row.draft.memory
    alone.speculator.finish(alone.row, 3)
    assert not alone.row.draft.memory


def test_without_drafters_nothing_is_proposed() -> None:
    assert Alone().propose() == ()
