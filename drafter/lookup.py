"""Drafters that look the continuation up in text instead of computing it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from slipstream.drafter.token_index import LONGEST_MATCH, TokenIndex
from slipstream.engine.speculation.protocol import Drafter, DraftRow, Proposal

EVIDENCE_BORDERS = (3, 4, 6, 10, LONGEST_MATCH)
"""Shortest match of each level of evidence but the lowest."""


def evidence(length: int) -> int:
    return sum(length >= border for border in EVIDENCE_BORDERS)


class NGramDrafter(Drafter):
    """Prompt lookup (Saxena 2023): what followed the longest match in the request's own prompt and answer."""

    name = "ngram"
    num_evidence = len(EVIDENCE_BORDERS) + 1

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        return [self._propose(row) for row in rows]

    def _propose(self, row: DraftRow) -> Proposal | None:
        index = row.memory.get(self.name)
        if index is None:
            index = row.memory[self.name] = TokenIndex()
        assert isinstance(index, TokenIndex)
        index.extend(row.tokens[len(index) : row.length].tolist())
        # Ties go to the latest place: what was said last is most likely to be said again.
        length, place = max(index.matches(index.text), key=_length, default=(0, 0))
        if not length:
            return None
        # Past the end of the text, what repeats goes on repeating.
        period = len(index) - place
        return Proposal.chain([index.text[place + i % period] for i in range(row.most)], evidence(length))


@dataclass(slots=True)
class _Scope:
    """Past text of one scope, in two halves: when the young one is full, the old one goes."""

    young: TokenIndex = field(default_factory=TokenIndex)
    old: TokenIndex = field(default_factory=TokenIndex)

    def __len__(self) -> int:
        return len(self.young) + len(self.old)


class SuffixDrafter(Drafter):
    """What followed the longest match in earlier answers of the same scope (SuffixDecoding, Oliaro et al. 2024).

    Scopes do not see each other's text. The text of all scopes together is bounded; the scope that was used least
    recently goes first, then the older half of the one that is left.
    """

    name = "suffix"
    num_evidence = len(EVIDENCE_BORDERS) + 1

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._scopes: OrderedDict[str, _Scope] = OrderedDict()  # least recently used first

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._scopes.values()))

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        return [self._propose(row) for row in rows]

    def finish(self, row: DraftRow) -> None:
        """Keeps the answer, with the end of its prompt as its context, if its sender lets it be kept."""
        answer = row.tokens[max(row.num_prompt - LONGEST_MATCH, 0) : row.length].tolist()[-self._capacity // 2 :]
        if row.length <= row.num_prompt or self.name not in row.drafters or not row.remember:
            return
        scope = self._scopes.setdefault(row.scope, _Scope())
        self._scopes.move_to_end(row.scope)
        if len(scope.young) + len(answer) > self._capacity // 2:
            scope.old, scope.young = scope.young, TokenIndex()
        scope.young.extend([*answer, -1])
        while self.num_tokens > self._capacity and len(self._scopes) > 1:
            self._scopes.popitem(last=False)
        if self.num_tokens > self._capacity:
            scope.old = TokenIndex()

    def _propose(self, row: DraftRow) -> Proposal | None:
        scope = self._scopes.get(row.scope)
        if scope is None:
            return None
        self._scopes.move_to_end(row.scope)
        context = row.tokens[max(row.length - LONGEST_MATCH, 0) : row.length].tolist()
        best: tuple[int, list[int]] = (0, [])
        for half in (scope.young, scope.old):
            length, place = max(half.matches(context), key=_length, default=(0, 0))
            if length > best[0]:
                best = length, list(half.text[place : place + row.most])
        length, tokens = best
        # A negative number stands between two answers.
        end = next((at for at, token in enumerate(tokens) if token < 0), len(tokens))
        return Proposal.chain(tokens[:end], evidence(length)) if end else None


def _length(match: tuple[int, int]) -> int:
    return match[0]
