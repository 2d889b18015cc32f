"""Which texts a round of training sees: recent traffic, a sample of all that came before, and long ones."""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

import numpy as np

from slipstream.drafter.traffic.index import held_out
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.training.held_out import HeldOut
from slipstream.drafter.training.packing import Example

LEAST_ANSWER = 3
"""Tokens of an answer with something to learn: the first two are not drafted from features of the answer."""
TRIES = 100
"""Texts in a row that cannot be used before drawing gives up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """Shares of a round's texts. What is left is recent traffic.

    A question that was asked n times counts as √n texts: what repeats is learned, and does not drive out the rest.
    """

    recent: int = 2000
    """Texts that count as recent."""
    carried: int = 100
    """The latest texts, which go on to count as recent once other weights of the target answer."""
    judged: int = 240
    """The latest texts, from which the gate goes on to take those held out, once other weights answer."""
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
    question: int
    is_repeat: bool
    """Whether it was asked before."""


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
            cache_bytes: features kept in memory, most recently used first, of those that ``prepare`` computes. What
                is read lies in pages of the store's files, and reading it again takes a fifth of a millisecond.
        """
        self._store = store
        self._prepare = prepare
        self._accepts = accepts
        self._mix = mix or Mix()
        self._random = Random(seed)
        self._cache: OrderedDict[int, Example] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached = 0
        self._asked: Counter[int] = Counter()
        """How often each question was asked, held out or not."""
        self._stream: list[_Known] = []
        """Recent texts, those that are held out among them."""
        self._recent: list[_Known] = []
        self._longest: list[_Known] = []
        self._turn: list[_Known] = []
        """Recent texts that are still to come in this turn."""
        self._reservoir: list[_Known] = []
        self._seen = self._greedy = self._learnable = 0
        self.last_id = 0
        """Id of the latest text there is."""
        self.tokens = 0
        """Tokens of answers that came so far, without those held out."""
        self.worth = 0.0
        """The same, each question's counted less with every time it was asked."""
        self.counts: dict[int, float] = {}
        """How often each token came in answers; earlier ones count less."""
        self.oldest = self.newest = 0.0
        """When the texts came, in seconds since 1970."""

    def refresh(self, after: int = 0) -> float:
        """Takes notice of what came since the last call.

        Returns how many tokens of answers in texts with ids > ``after`` are worth learning: those of a question asked
        again and again are worth less each time.
        """
        new = 0.0
        for sample in self._store.samples(self.last_id, features=False):
            self.last_id = sample.id
            answer = sample.tokens[sample.num_prompt :]
            if not self._accepts(sample) or len(answer) < LEAST_ANSWER:
                continue
            self._asked[sample.question] += 1
            times = self._asked[sample.question]
            known = _Known(sample.id, len(answer), sample.question, times > 1)
            self._stream.append(known)
            if held_out(sample.question):
                continue
            self.tokens += len(answer)
            worth = math.sqrt(times) - math.sqrt(times - 1)
            self.worth += worth * len(answer)
            new += worth * len(answer) if sample.id > after else 0
            self._greedy += sample.greedy
            self._learnable += 1
            for token in answer.tolist():
                self.counts[token] = self.counts.get(token, 0.0) + 1.0
            self.oldest = min(self.oldest or sample.time, sample.time)
            self.newest = max(self.newest, sample.time)
            self._recent.append(known)
            if self._random.random() < worth:
                self._keep(known)
        del self._recent[: -self._mix.recent], self._stream[: -self._mix.recent]
        self._find_longest()
        return new

    def target_changed(self) -> None:
        """Other weights answer from now on: of what came before only the latest texts still say how they do."""
        del self._stream[: -self._mix.judged]
        del self._recent[: -self._mix.carried]
        self._turn.clear()
        self._find_longest()

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
        return 2 * self._greedy >= self._learnable

    def draw(self) -> Iterator[Example]:
        """Texts without end; stops where there are none."""
        failures = 0
        while self._recent and failures < TRIES:
            example = self._example(self._next().id)
            failures = failures + 1 if example is None else 0
            if example is not None:
                yield example

    def held_out(self, texts: int) -> HeldOut:
        """About as many texts to judge by, of two kinds, weighted as they are among the recent ones.

        Of what was asked for the first time, the latest texts that training does not see. Of what was asked before, any
        recent ones: traffic like this will ask it again, mostly when it was learned.
        """
        repeats = [known for known in self._stream if known.is_repeat]
        fresh = [known for known in self._stream if not known.is_repeat and held_out(known.question)]
        share = len(repeats) / len(self._stream) if self._stream else 0.0
        chosen = [
            self._examples(reversed(fresh), texts - round(texts * share)),
            self._examples(Random(0).sample(repeats, len(repeats)), round(texts * share)),
        ]
        shares = [1 - share if chosen[0] else 0.0, share if chosen[1] else 0.0]
        weights = [np.full(len(kind), part / max(len(kind), 1)) for kind, part in zip(chosen, shares, strict=True)]
        return HeldOut([*chosen[0], *chosen[1]], np.concatenate(weights), share)

    def latest(self, texts: int) -> HeldOut:
        """The latest texts, whatever training sees."""
        found: list[Example] = []
        for sample in self._store.samples(order="recent"):
            if self._accepts(sample) and (example := self._ready(sample)) is not None:
                found.append(example)
            if len(found) == texts:
                break
        return HeldOut(found, np.ones(len(found)))

    def drop(self) -> None:
        """Forgets texts that are no longer in the store: purged ones must not be learned from."""
        present = self._store.questions()
        self._stream, self._recent, self._reservoir, self._turn = (
            [known for known in texts if known.id in present]
            for texts in (self._stream, self._recent, self._reservoir, self._turn)
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
            turn = self._without_most_repeats()
            self._turn = self._random.sample(turn, len(turn))
        return self._turn.pop()

    def _without_most_repeats(self) -> list[_Known]:
        by_question: defaultdict[int, list[_Known]] = defaultdict(list)
        for known in self._recent:
            by_question[known.question].append(known)
        return [
            known
            for asked in by_question.values()
            for known in self._random.sample(asked, math.ceil(math.sqrt(len(asked))))
        ]

    def _find_longest(self) -> None:
        self._longest = heapq.nlargest(max(len(self._recent) // 4, 1), self._recent, key=lambda known: known.tokens)

    def _keep(self, known: _Known) -> None:
        self._seen += 1
        if len(self._reservoir) < self._mix.reservoir:
            self._reservoir.append(known)
        elif (place := self._random.randrange(self._seen)) < self._mix.reservoir:
            self._reservoir[place] = known

    def _examples(self, texts: Iterable[_Known], most: int) -> list[Example]:
        found = (example for known in texts if (example := self._example(known.id)) is not None)
        return list(islice(found, most))

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
        if example is not None and not _was_read(example, sample):
            self._cache[sample.id] = example
            self._cached += _bytes(example)
            while self._cached > self._cache_bytes and len(self._cache) > 1:
                _, left = self._cache.popitem(last=False)
                self._cached -= _bytes(left)
        return example


def _was_read(example: Example, sample: Sample) -> bool:
    """Whether the features are those that the store has."""
    kept = sample.features
    return kept is not None and kept.untyped_storage().data_ptr() == example.features.untyped_storage().data_ptr()


def _bytes(example: Example) -> int:
    """Bytes of memory held, also by what was cut off."""
    return example.features.untyped_storage().nbytes()
