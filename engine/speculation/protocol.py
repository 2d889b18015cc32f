"""What the engine asks of a drafter, which proposes the tokens that come next, and what a drafter is told.

Every position is sampled from the target's own distribution with noise that belongs to the request's seed and to the
index of the token, whatever was proposed; a draft token is accepted if it is what was sampled. So drafters decide how
fast an answer comes, never which one. One that knows a distribution races it with the same noise (``ops.race``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slipstream.engine.messages import SamplingParams, TrafficLevel
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.models.weights import Weights
from slipstream.engine.speculation.scratch import Scratch
from slipstream.kernels.kv_cache import PagedKVCache
from slipstream.kernels.readback import sent

GREEDY = SamplingParams(max_tokens=0, temperature=0.0)


@dataclass(slots=True)
class DraftRow:
    """A running request as drafters see it; lives as long as the request keeps its row."""

    slot: int
    """Row of the host's block tables."""
    scope: str
    """Requests of different scopes must not learn from each other's text."""
    num_prompt: int
    tokens: NDArray[np.int32]
    """The row's token table; its first ``length`` entries are known."""
    length: int
    drafters: frozenset[str]
    """Names of the drafters this request may use."""
    route: str = ""
    """The route whose version of a learned drafter is to be used; the shared one if this route holds none."""
    mapped: int = 0
    """Positions that have a block in the block tables."""
    most: int = 0
    """Draft tokens wanted at most, on all branches together; 0 for none."""
    memory: dict[str, object] = field(default_factory=dict)
    """What a drafter keeps about the request, by its name."""
    request_id: int = 0
    traffic: TrafficLevel = "off"
    """What listeners may keep of the request."""
    remember: bool = True
    """Whether ``Drafter.finish`` may learn from its text."""
    seed: int = 0
    """With the index of a token (``index`` for the next one), what the noise it is sampled with belongs to."""
    params: SamplingParams = GREEDY
    """How its tokens are sampled."""

    @property
    def index(self) -> int:
        """The index of the next token in the answer."""
        return self.length - self.num_prompt

    @property
    def known(self) -> NDArray[np.int32]:
        return self.tokens[: self.length]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A tree of draft tokens: several may follow the same token, of which one at most is right."""

    tokens: list[int]
    parents: list[int]
    """The draft token that each one follows, which stands before it in the list; -1 for the last known token."""
    evidence: list[int]
    """How well founded each draft token is if its parent is right: acceptance is learned apart for each number.

    0 is the weakest.
    """
    version: int = 0
    """Version of the learned drafter that proposes; 0 for a drafter without versions."""

    @classmethod
    def chain(cls, tokens: list[int], evidence: int, version: int = 0) -> Proposal:
        """Each draft token follows the one before it, all equally well founded."""
        return cls(tokens, list(range(-1, len(tokens) - 1)), [evidence] * len(tokens), version)

    def check(self, most: int, vocab_size: int, num_evidence: int) -> None:
        """Raises ValueError where this is no tree of at most so many tokens of the vocabulary."""
        count = len(self.tokens)
        if count > most or len(self.parents) != count or len(self.evidence) != count:
            raise ValueError(f"a proposal of {count} tokens, {most} were wanted at most")
        if count and not 0 <= min(self.tokens) <= max(self.tokens) < vocab_size:
            raise ValueError(f"a proposal with tokens outside the vocabulary of {vocab_size}: {self.tokens}")
        if count and not 0 <= min(self.evidence) <= max(self.evidence) < num_evidence:
            raise ValueError(f"a proposal with evidence outside 0 … {num_evidence - 1}: {self.evidence}")
        if not all(-1 <= parent < node for node, parent in enumerate(self.parents)):
            raise ValueError(f"a proposal in which a draft token stands before its parent: {self.parents}")


@dataclass(frozen=True, slots=True)
class DraftHost:
    """What a drafter shares with the engine it works for."""

    model: CausalModel
    block_tables: NDArray[np.int32]
    """[slots and rows of ``scratch``, blocks]: cache blocks of each running request; changes from step to step."""
    num_blocks: int
    """Blocks of the cache, those of ``scratch`` included."""
    block_size: int
    scratch: Scratch
    """Blocks for branches of trees; whoever uses them resets them first."""
    latest: Tensor | None = None
    """What token ids below 0 stand for: see ``RaggedBatch``."""
    missed: Tensor | None = None
    """By slot, how many draft tokens of a step that is yet to be read are wrong; 0 behind the last slot."""


@dataclass(frozen=True, slots=True)
class Computed:
    """Positions of a row that a step computed, without those of rejected draft tokens."""

    row: DraftRow
    start: int
    """The first of these positions."""
    of_step: Tensor
    """[rows of the batch, taps, hidden] float32: features of all that the step computed."""
    rows: Sequence[int]
    """Which of these are those of the positions."""
    top: tuple[Tensor, Tensor] | None = None
    """Set where listeners want it: ids [sampled, k] int32 and log-probabilities [sampled, k] float16 of the most likely
    tokens at the places of the tokens sampled in the step, which are the row's last; before any sampling parameter."""

    @property
    def features(self) -> Tensor:
        """[positions, taps, hidden] float32. Cut when it is looked at, as many are not; what is cut keeps the whole."""
        return take(self.of_step, self.rows)


def take(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a tensor, without a copy where they follow each other."""
    first = rows[0]
    if isinstance(rows, range) or rows == list(range(first, first + len(rows))):
        return tensor[first : first + len(rows)]
    return tensor[sent(np.array(rows), tensor.device)]


@dataclass(frozen=True, slots=True)
class DraftNeeds:
    """What drafting needs of an engine."""

    most: int = 0
    """Draft tokens per request and step at most, over all drafters; 0 without any."""
    costly: bool = False
    """A proposal takes a noticeable part of a step, so it is asked for only where it pays."""
    own_blocks: bool = False
    """Keys and values are kept for draft tokens, too: draft positions need blocks."""
    branches: bool = False
    """Proposals are trees, whose branches are verified in scratch blocks."""

    @classmethod
    def of(cls, drafters: Sequence[Drafter], most: int) -> DraftNeeds:
        """What these drafters need together if they propose at most so many tokens."""
        needs = [drafter.needs for drafter in drafters]
        return cls(
            most if drafters else 0,
            any(each.costly for each in needs),
            any(each.own_blocks for each in needs),
            any(each.branches for each in needs),
        )


@dataclass(frozen=True, slots=True)
class Coming:
    """A row of a step that is about to be launched, and after which its drafter is asked."""

    row: DraftRow
    start: int
    """The first position that the step computes."""
    known: int
    """Positions of known tokens among these; the first token is sampled after the last of them."""
    batch_row: int
    """Where they begin among all that the step computes; draft tokens follow them."""
    sample: int
    """Place of the first of the row's tokens among all that are sampled, one more than draft tokens."""
    drafts: Sequence[int]
    """The draft tokens that are verified, a chain; those below 0 only the device knows, see ``DraftHost.latest``."""
    is_late: bool = False
    """Whether the step before is yet to be read. Then the row is as long as if all of its draft tokens were right; see
    ``DraftHost.missed``."""


class Begun(Protocol):
    """Proposals that the device makes behind a step, before anybody has read what the step sampled."""

    @property
    def arrays(self) -> Sequence[NDArray[Any]]:
        """What that takes on the device; travels with the step, as columns of its batch."""

    @property
    def slots(self) -> Sequence[int]:
        """Those of the rows that it proposes for."""

    def launch(self, columns: Sequence[Tensor], features: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Has the device make them, behind the step; called once.

        Args:
            columns: ``arrays``, there.
            features: [rows of the batch, taps, hidden] float32 that the step computes.
            samples: [samples] int32 that it samples; 0 where there is none.
        Returns:
            Any int32, which come back with the step's tokens, for ``tell``; and of each row how many draft tokens of
            the step were wrong, the token that was sampled last, and draft tokens after it, [rows, 2 + n] int32.
        """

    def tell(self, told: NDArray[np.int32]) -> None:
        """These came back, flat; ``Drafter.propose`` of the rows follows, once they have their tokens."""

    def chain(self, place: int) -> Sequence[int]:
        """The draft tokens of a row that are there by now."""


class Drafter(ABC):
    """Methods are called between two forward passes of the target, in the thread that runs them."""

    name: str
    num_evidence: int
    """Evidence runs from 0 to num_evidence - 1."""
    needs = DraftNeeds()

    def taps(self, model: CausalModel) -> tuple[int, ...]:
        """Layers of the target whose inputs it wants to see, ascending; their number for the output of the last.

        Called once, before ``attach``; raises ConfigError or ModelError if the drafter does not fit.
        """
        return ()

    def attach(self, host: DraftHost) -> None:
        """Called once, before anything that follows."""
        return

    def prepare_target(self, weights: Weights) -> Callable[[], None]:
        """The target is about to use these weights; called in another thread, while it drafts for the old ones.

        What it returns is called when the target uses them, in the thread of the steps and between two of them. What
        was computed with the old ones costs acceptance only.
        """
        return lambda: None

    def forget_target(self) -> None:
        """The target's weights are gone; others follow, before anything is drafted (``prepare_target``)."""
        return

    @property
    def caches(self) -> Sequence[PagedKVCache]:
        """Its own keys and values. What they hold may be lost between two steps, which costs acceptance only."""
        return ()

    def observe(self, computed: Sequence[Computed]) -> None:
        """What the target computed in a step; only called for drafters with taps."""
        return

    @property
    def begins(self) -> bool:
        """Whether it is asked to ``begin``; does not change after ``attach``."""
        return False

    def begin(self, coming: Sequence[Coming]) -> Sequence[Begun]:
        """Prepares to propose for these rows behind a step that is about to be launched, as far as it can.

        Whatever comes of it, ``observe`` and ``propose`` are called after the step as for other rows.
        """
        return ()

    @abstractmethod
    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        """One proposal per row of at most ``row.most`` tokens, or None where there is nothing to go on."""

    def finish(self, row: DraftRow) -> None:
        """The request has ended; its text may be learned from, within its scope."""
        return


class LearnedDrafter(Drafter):
    """A drafter whose weights can be changed while it drafts: each route holds one version of them."""

    @property
    @abstractmethod
    def routes(self) -> Mapping[str, int]:
        """The version each route holds. Requests whose route holds none use that of the route "", if it holds one."""

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """What all routes together take."""

    @abstractmethod
    def swap_loaded(self, route: str, version: int, path: str) -> bool:
        """Makes a version live, between two steps, if that takes nothing but to point at it: it is still in memory."""

    @abstractmethod
    def prepare(self, route: str, version: int, path: str) -> Callable[[], None]:
        """Reads and checks a version, in another thread and while it drafts with the old one.

        What it returns makes the new version live, in the thread of the steps and between two of them; until then
        nothing else is prepared. Raises ModelError or ConfigError, and changes nothing, if the version does not fit.
        """

    @abstractmethod
    def drop(self, route: str) -> None:
        """The route holds none from now on; raises ConfigError if it does not hold one."""
