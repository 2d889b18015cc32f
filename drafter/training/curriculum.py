"""Which texts a round of training sees: recent traffic, a sample of all that came before, and long ones."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.training.packing import Example

LEAST_ANSWER = 3
"""Tokens of an answer with something to learn: the first two are not guessed from features of the answer."""
TRIES = 100
"""Texts in a row that cannot be used before drawing gives up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """Shares of a round's texts. What is left is recent traffic."""

    recent: int = 2000
    """Texts that count as recent."""
    replay: float = 0.3
    """Drawn evenly from all traffic so far, so that what was learned once is not forgotten."""
    long: float = 0.1
    """Drawn from the longest quarter of the recent ones: short answers end first, and would be all there is in a round
    that starts before the long ones end (one-step-off sampling of TLT)."""
    reservoir: int = 4000
    """Texts kept for replay, an even sample of the stream (Vitter 1985)."""


@dataclass(frozen=True, slots=True)
class _Known:
    id: int
    tokens: int


class Curriculum:
    """Follows a traffic store; texts held out for the gate are never drawn."""

    def __init__(
        self,
        store: TrafficStore,
        prepare: Callable[[Sample], Example | None],
        accepts: Callable[[Sample], bool] = lambda sample: True,
        mix: Mix | None = None,
        cache_bytes: int = 1 << 30,
        seed: int = 0,
    ) -> None:
        """
        Args:
            prepare: makes a text ready, recomputing features where only tokens were kept; None leaves it out.
            accepts: whether a sample belongs to the head that is trained, for one that serves some requests only.
            cache_bytes: features kept in memory, most recently used first.
        """
        self._store = store
        self._prepare = prepare
        self._accepts = accepts
        self._mix = mix or Mix()
        self._random = Random(seed)
        self._cache: OrderedDict[int, Example] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached = 0
        self._recent: list[_Known] = []
        self._longest: list[_Known] = []
        self._turn: list[_Known] = []
        """Recent texts that are still to come in this turn."""
        self._reservoir: list[_Known] = []
        self._seen = self._greedy = 0
        self.last_id = 0
        """Of the latest text there is."""
        self.tokens = 0
        """Tokens of answers that came so far."""
        self.counts: dict[int, float] = {}
        """How often each token came in answers; earlier ones count less."""
        self.oldest = self.newest = 0.0
        """When the texts came, in seconds since 1970."""

    def refresh(self, after: int = 0) -> int:
        """Takes notice of what came since the last call; how many tokens of answers, in texts with ids > ``after``."""
        new = 0
        for sample in self._store.samples(self.last_id, holdout=False):
            self.last_id = sample.id
            answer = sample.tokens[sample.num_prompt :]
            if not self._accepts(sample) or len(answer) < LEAST_ANSWER:
                continue
            self.tokens += len(answer)
            new += len(answer) if sample.id > after else 0
            self._greedy += sample.greedy
            for token in answer.tolist():
                self.counts[token] = self.counts.get(token, 0.0) + 1.0
            self.oldest = min(self.oldest or sample.time, sample.time)
            self.newest = max(self.newest, sample.time)
            known = _Known(sample.id, len(answer))
            self._recent.append(known)
            self._keep(known)
        del self._recent[: -self._mix.recent]
        self._find_longest()
        return new

    def forget(self, share: float) -> None:
        """Lets earlier tokens count ``share`` as much as before, so that the counts follow the traffic."""
        self.counts = {token: count * share for token, count in self.counts.items() if count * share > 0.01}

    @property
    def num_texts(self) -> int:
        """Recent ones."""
        return len(self._recent)

    @property
    def is_greedy(self) -> bool:
        """Whether at least half of the texts are."""
        return 2 * self._greedy >= self._seen

    def draw(self) -> Iterator[Example]:
        """Texts without end; stops where there are none."""
        failures = 0
        while self._recent and failures < TRIES:
            example = self._example(self._next().id)
            failures = failures + 1 if example is None else 0
            if example is not None:
                yield example

    def held_out(self, texts: int) -> list[Example]:
        """The latest texts that training does not see."""
        return self.latest(texts, holdout=True)

    def latest(self, texts: int, holdout: bool | None) -> list[Example]:
        """The latest texts; ``holdout`` as in TrafficStore.samples."""
        found: list[Example] = []
        for sample in self._store.samples(order="recent", holdout=holdout):
            if self._accepts(sample) and (example := self._ready(sample)) is not None:
                found.append(example)
            if len(found) == texts:
                break
        return found

    def drop(self) -> None:
        """Forgets texts that are no longer in the store: purged ones must not be learned from."""
        present = set(self._store.ids())
        self._recent, self._reservoir, self._turn = (
            [known for known in texts if known.id in present] for texts in (self._recent, self._reservoir, self._turn)
        )
        self._find_longest()
        for id_ in [id_ for id_ in self._cache if id_ not in present]:
            self._cached -= _bytes(self._cache.pop(id_))

    def _next(self) -> _Known:
        kind = self._random.random()
        if kind < self._mix.replay and self._reservoir:
            return self._random.choice(self._reservoir)
        if kind < self._mix.replay + self._mix.long:
            return self._random.choice(self._longest)
        # Recent texts come in turn, in a new order each time.
        if not self._turn:
            self._turn = self._random.sample(self._recent, len(self._recent))
        return self._turn.pop()

    def _find_longest(self) -> None:
        self._longest = heapq.nlargest(max(len(self._recent) // 4, 1), self._recent, key=lambda known: known.tokens)

    def _keep(self, known: _Known) -> None:
        self._seen += 1
        if len(self._reservoir) < self._mix.reservoir:
            self._reservoir.append(known)
        elif (place := self._random.randrange(self._seen)) < self._mix.reservoir:
            self._reservoir[place] = known

    def _example(self, id_: int) -> Example | None:
        if id_ in self._cache:
            self._cache.move_to_end(id_)
            return self._cache[id_]
        sample = next(self._store.samples(id_ - 1, limit=1), None)
        return self._ready(sample) if sample is not None and sample.id == id_ else None

    def _ready(self, sample: Sample) -> Example | None:
        if sample.id in self._cache:
            self._cache.move_to_end(sample.id)
            return self._cache[sample.id]
        example = self._prepare(sample)
        if example is not None:
            self._cache[sample.id] = example
            self._cached += _bytes(example)
            while self._cached > self._cache_bytes and len(self._cache) > 1:
                _, left = self._cache.popitem(last=False)
                self._cached -= _bytes(left)
        return example


def _bytes(example: Example) -> int:
    """Of memory held, also by what was cut off."""
    return example.features.untyped_storage().nbytes()
