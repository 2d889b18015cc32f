"""Groups of rollouts that end together: the samples of a prompt, in one request or in several.

A trainer often needs no more than so many finished samples of a prompt, or only the promising ones. Once enough of a
group have come to their end, or where a caller's scores put others ahead, the rest are aborted: each answers with its
tokens so far and the finish reason ``abort``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

Name = tuple[str, str]
"""The tenant, and what it calls the group."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """What a request says of the batch of rollouts that it belongs to."""

    group: str = ""
    """Requests of the same tenant that name the same group end together; empty: the request's own samples do."""
    enough: int = 0
    """How many whole answers of the group are enough; 0: all are wanted."""
    expected_tokens: int = 0
    """How long an answer is expected to be; 0: as long as earlier ones to the same prompt."""


@dataclass
class _Group:
    requests: int = 0
    """Requests that belong to it and have not ended."""
    open: dict[str, int] = field(default_factory=dict)
    """Sequences that run or wait in the engine, by their ids."""
    whole: int = 0
    """How many have come to their end by themselves."""


class Groups:
    """All groups with open requests; the last one to leave takes its group along."""

    def __init__(self, abort: Callable[[Sequence[int]], None]) -> None:
        """``abort`` ends sequences in the engine."""
        self._abort = abort
        self._groups: dict[Name, _Group] = {}

    @contextmanager
    def joined(self, name: Name, enough: int, sequences: Mapping[str, int]) -> Iterator[Callable[[str], None]]:
        """Around sequences of a group, by their ids. Gives what to call when one has come to its end.

        ``enough``: how many whole answers end the group; 0 leaves that to others. Who joins later is ended at once.
        """
        group = self._groups.setdefault(name, _Group())
        group.open |= sequences
        group.requests += 1

        def ended(sequence: str) -> None:
            if group.open.pop(sequence, None) is not None:
                group.whole += 1
                end_if_enough()

        def end_if_enough() -> None:
            if enough and group.whole >= enough:
                self._end(group, list(group.open))

        end_if_enough()
        try:
            yield ended
        finally:
            for sequence in sequences:
                group.open.pop(sequence, None)
            group.requests -= 1
            if not group.requests:
                del self._groups[name]

    def prune(self, name: Name, scores: Mapping[str, float], keep: int) -> list[str]:
        """Aborts all but the ``keep`` best of the open sequences that have a score; which ones it aborted.

        Ties go to the one that is named first. What has ended already counts among those kept, if it has a score.
        """
        group = self._groups.get(name)
        if group is None:
            return []
        ranked = sorted(scores, key=lambda sequence: -scores[sequence])
        pruned = [sequence for sequence in ranked[keep:] if sequence in group.open]
        self._end(group, pruned)
        return pruned

    def _end(self, group: _Group, sequences: Sequence[str]) -> None:
        if sequences:
            self._abort([group.open.pop(sequence) for sequence in sequences])
