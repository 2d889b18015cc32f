"""Drafters that look the continuation up in text instead of computing it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from slipstream.drafter.token_index import LONGEST_MATCH, TokenIndex
from slipstream.engine.speculation.protocol import Drafter, DraftRow, Proposal

AGREEMENT = (0.5, 0.75)
"""Borders of the share of places at which the same token follows, where not all agree."""
SUPPORT = (2, 4)
"""Borders of the number of places, where all agree …"""
LENGTHS = (4, 8, 16)
"""… and of the length of the match, which grows with every draft token that is right."""
NUM_EVIDENCE = len(AGREEMENT) + 1 + (len(SUPPORT) + 1) * (len(LENGTHS) + 1)


def evidence(agree: int, places: int, length: int) -> int:
    """How well founded a token is that follows at ``agree`` of the places of a match of so many tokens."""
    if agree < places:
        return sum(agree >= border * places for border in AGREEMENT)
    long, many = (sum(value >= each for each in borders) for value, borders in ((length, LENGTHS), (places, SUPPORT)))
    return len(AGREEMENT) + 1 + long * (len(SUPPORT) + 1) + many


def vote(length: int, continuations: Sequence[Sequence[int]], most: int) -> Proposal | None:
    """Token by token what follows most often, of those that agreed so far; of equals, what followed last.

    ``continuations`` stand behind matches of ``length`` tokens, the latest one last. A negative token ends them.
    """
    tokens: list[int] = []
    levels: list[int] = []
    while len(tokens) < most:
        at = len(tokens)
        following = [each[at] for each in continuations if at < len(each)]
        if not following:
            break
        last = following[-1]
        agree = following.count(last)
        if 2 * agree < len(following):  # else none is more frequent
            last = max(reversed(following), key=following.count)
            agree = following.count(last)
        if last < 0:
            break
        tokens.append(last)
        levels.append(evidence(agree, len(following), length + at))
        if agree < len(continuations):
            continuations = [each for each in continuations if at < len(each) and each[at] == last]
    return Proposal(tokens, list(range(-1, len(tokens) - 1)), levels) if tokens else None


class NGramDrafter(Drafter):
    """Prompt lookup (Saxena 2023): what followed the longest match in the request's own prompt and answer."""

    name = "ngram"
    num_evidence = NUM_EVIDENCE

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        return [self._propose(row) for row in rows]

    def _propose(self, row: DraftRow) -> Proposal | None:
        index = row.memory.get(self.name)
        if index is None:
            index = row.memory[self.name] = TokenIndex()
        assert isinstance(index, TokenIndex)
        index.extend(row.tokens[len(index) : row.length].tolist())
        length, places = index.matches(index.text)
        return vote(length, [_following(index, place, row.most) for place in places], row.most)


def _following(index: TokenIndex, place: int, most: int) -> Sequence[int]:
    """Past the end of the text, what repeats goes on repeating."""
    found = index.text[place : place + most]
    while len(found) < most:
        found += found[: most - len(found)]
    return found


@dataclass(slots=True)
class _Scope:
    """Past text of one scope, in two halves: when the young one is full, the old one goes."""

    young: TokenIndex = field(default_factory=TokenIndex)
    old: TokenIndex = field(default_factory=TokenIndex)

    def __len__(self) -> int:
        return len(self.young) + len(self.old)


class SuffixDrafter(Drafter):
    """What followed the longest match in earlier answers of the same scope (SuffixDecoding, Oliaro et al. 2024).

    Where they went on differently, the most frequent continuation is proposed; how many agree tells how likely it is.
    Scopes do not see each other's text. The text of all scopes together is bounded; the scope that was used least
    recently goes first, then the older half of the one that is left.
    """

    name = "suffix"
    num_evidence = NUM_EVIDENCE

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
        length, places, half = max(
            ((*half.matches(context), half) for half in (scope.young, scope.old)), key=lambda found: found[0]
        )
        return vote(length, [half.text[place : place + row.most] for place in places], row.most)
