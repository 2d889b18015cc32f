"""Which texts a round of training sees: recent traffic, a sample of all that came before, and long ones."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.training.packing import Example


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
        self._reservoir: list[_Known] = []
        self._seen = 0
        self._last_id = 0
        self.tokens = 0
        """Tokens of answers that came so far."""
        self.counts: Counter[int] = Counter()
        """How often each token came in answers; earlier ones count less."""
        self.oldest = self.newest = 0.0

    def refresh(self) -> int:
        """Takes notice of what came since the last call; how many tokens of answers."""
        before = self.tokens
        for sample in self._store.samples(self._last_id, holdout=False):
            self._last_id = sample.id
            answer = sample.tokens[sample.num_prompt :]
            if not self._accepts(sample) or len(answer) < 3:
                continue
            self.tokens += len(answer)
            self.counts.update(answer.tolist())
            self.oldest = self.oldest or sample.time
            self.newest = max(self.newest, sample.time)
            known = _Known(sample.id, len(answer))
            self._recent.append(known)
            self._keep(known)
        del self._recent[: -self._mix.recent]
        return self.tokens - before

    def forget(self, share: float) -> None:
        """Lets earlier tokens count ``share`` as much as before, so that the counts follow the traffic."""
        self.counts = Counter(
            {token: round(count * share) for token, count in self.counts.items() if count * share >= 1}
        )

    @property
    def num_texts(self) -> int:
        return len(self._recent)

    def draw(self) -> Iterator[Example]:
        """Texts without end; stops where there are none."""
        longest = sorted(self._recent, key=lambda known: known.tokens)[-max(len(self._recent) // 4, 1) :]
        order: list[_Known] = []
        failures = 0
        while self._recent and failures < 100:
            kind = self._random.random()
            if kind < self._mix.replay:
                known = self._random.choice(self._reservoir)
            elif kind < self._mix.replay + self._mix.long:
                known = self._random.choice(longest)
            else:
                # Recent texts come in turn, in a new order each time.
                if not order:
                    order = self._random.sample(self._recent, len(self._recent))
                known = order.pop()
            example = self._example(known.id)
            failures = failures + 1 if example is None else 0
            if example is not None:
                yield example

    def held_out(self, texts: int) -> list[Example]:
        """The latest texts that training does not see."""
        found: list[Example] = []
        for sample in self._store.samples(order="recent", holdout=True):
            if self._accepts(sample) and (example := self._prepare(sample)) is not None:
                found.append(example)
            if len(found) == texts:
                break
        return found

    def drop(self) -> None:
        """Forgets texts that are no longer in the store: purged ones must not be learned from."""
        present = set(self._store.ids())
        self._recent = [known for known in self._recent if known.id in present]
        self._reservoir = [known for known in self._reservoir if known.id in present]
        for id_ in [id_ for id_ in self._cache if id_ not in present]:
            self._cached -= self._cache.pop(id_).features.nbytes

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
        samples: Sequence[Sample] = list(self._store.samples(id_ - 1, limit=1))
        example = self._prepare(samples[0]) if samples and samples[0].id == id_ else None
        if example is not None:
            self._cache[id_] = example
            self._cached += example.features.nbytes
            while self._cached > self._cache_bytes and len(self._cache) > 1:
                _, left = self._cache.popitem(last=False)
                self._cached -= left.features.nbytes
        return example
