"""What is proposed for a running request, and what is known of its drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.engine.grammars.grammar import Constraint
from slipstream.engine.runner.acceptance import OwnAcceptance
from slipstream.engine.speculation.protocol import DraftRow
from slipstream.engine.speculation.tree import Tree


@dataclass(frozen=True, slots=True)
class RatedProposal:
    """A proposal with what is known of its acceptance; the lists are parallel, an entry per draft token."""

    drafter: str
    version: int
    """Version of the learned drafter that proposed; 0 for other drafters."""
    tree: Tree
    evidence: Sequence[int]
    positions: Sequence[int]
    rates: Sequence[float]
    chances: Sequence[float]

    def take(self, nodes: Sequence[int]) -> RatedProposal:
        """Only these nodes, in this order; the parent of each is among those before it."""
        if nodes == list(range(len(self.chances))):
            return self
        place = {-1: -1} | {node: at for at, node in enumerate(nodes)}
        tree = Tree([self.tree.tokens[i] for i in nodes], [place[self.tree.parents[i]] for i in nodes])
        return RatedProposal(
            self.drafter,
            self.version,
            tree,
            [self.evidence[i] for i in nodes],
            [self.positions[i] for i in nodes],
            [self.rates[i] for i in nodes],
            [self.chances[i] for i in nodes],
        )


class RowDrafts:
    """What speculation knows of a running request."""

    __slots__ = ("best", "constraint", "draft", "own")

    def __init__(self, draft: DraftRow) -> None:
        self.draft = draft
        self.own = {name: OwnAcceptance() for name in draft.drafters}
        self.constraint: Constraint | None = None
        """What its grammar allows, if it has one."""
        self.best: RatedProposal | None = None
        """What is proposed for it now."""
