"""An engine without processes or sockets, for tests and experiments of every room."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import EngineStats, NewRequest, SamplingParams, TokenDelta
from slipstream.engine.plan import NewRow, StepPlan, StepResult
from slipstream.engine.process import Engine


@dataclass(slots=True)
class Completion:
    """Everything one request was told."""

    request_id: int
    deltas: list[TokenDelta] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]

    @property
    def finish_reason(self) -> str | None:
        return self.deltas[-1].finish_reason if self.deltas else None

    @property
    def num_cached_tokens(self) -> int:
        return self.deltas[0].num_cached_tokens

    @property
    def num_preemptions(self) -> int:
        return self.deltas[-1].num_preemptions


class LocalEngine:
    """The real engine, stepped by the caller."""

    def __init__(self, config: EngineConfig) -> None:
        self.completions: dict[int, Completion] = {}
        self.stats = EngineStats()
        self.engine = Engine(config, self._deliver)

    def submit(self, prompt: Sequence[int], params: SamplingParams, **fields: object) -> Completion:
        completion = Completion(len(self.completions) + 1)
        self.completions[completion.request_id] = completion
        request = NewRequest(request_id=completion.request_id, prompt=list(prompt), params=params, **fields)  # type: ignore[arg-type]
        self.engine.scheduler.add(request)
        return completion

    def step(self) -> None:
        self.engine.core.step()

    def finish(self) -> None:
        """Steps until nothing is left to do, then checks the books."""
        while self.engine.core.has_work:
            self.step()
        self.engine.scheduler.check_integrity()

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """All prompts at once."""
        completions = [self.submit(prompt, params) for prompt in prompts]
        self.finish()
        return completions

    def close(self) -> None:
        self.engine.core.close()

    def _deliver(self, deltas: list[TokenDelta], stats: EngineStats) -> None:
        self.stats = stats
        for delta in deltas:
            completion = self.completions[delta.request_id]
            assert completion.finish_reason is None, "a request was told something after its end"
            completion.deltas.append(delta)


def simulated_token(history: Sequence[int], vocab: int) -> int:
    """The next token of the model that SimulatedRunner stands for: a hash of everything before it."""
    digest = blake2b(array("i", history).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocab


class SimulatedRunner:
    """Executes plans without a model and checks that every read of the cache would find the right content.

    A cache position holds a digest of all tokens up to and including its own, which is what real keys and values
    depend on. A step that attends to a position holding anything else is an error in scheduling or block sharing.
    """

    def __init__(self, num_blocks: int, block_size: int, vocab: int) -> None:
        self._block_size = block_size
        self._vocab = vocab
        self._cells: list[bytes | None] = [None] * (num_blocks * block_size)
        self._rows: dict[int, NewRow] = {}
        self._tokens: dict[int, list[int]] = {}
        self._tables: dict[int, dict[int, int]] = {}
        self.tokens_computed = 0

    def execute(self, plan: StepPlan) -> StepResult:
        for new in plan.new:
            self._rows[new.slot] = new
            self._tokens[new.slot] = list(new.tokens)
            self._tables[new.slot] = {}
        for slot, first, blocks in plan.blocks:
            self._tables[slot].update(enumerate(blocks, first))
        size = self._block_size
        copied = [self._cells[source * size : (source + 1) * size] for source, _ in plan.copies]
        for (_, destination), cells in zip(plan.copies, copied, strict=True):
            self._cells[destination * size : (destination + 1) * size] = cells
        rows = list(zip(plan.slots, plan.starts, plan.counts, strict=True))
        assert len({slot for slot, _, _ in rows}) == len(rows), "a row is in the step twice"
        for slot, start, count in rows:
            for position in range(start, start + count):
                self._cells[self._cell(slot, position)] = self._digest(slot, position)
            self.tokens_computed += count
        for slot, start, count in rows:
            for position in range(start + count):
                assert self._cells[self._cell(slot, position)] == self._digest(slot, position), "stale keys and values"
        drawn = []
        for (slot, start, count), wanted in zip(rows, plan.samples, strict=True):
            tokens = self._tokens[slot]
            if not wanted:
                drawn.append(-1)
                continue
            assert start + count == len(tokens), "a token is drawn before its predecessors are computed"
            drawn.append(simulated_token(tokens, self._vocab))
            tokens.append(drawn[-1])
        return StepResult(drawn, {}, {}, {}, seconds=0.001)

    def _cell(self, slot: int, position: int) -> int:
        return self._tables[slot][position // self._block_size] * self._block_size + position % self._block_size

    def _digest(self, slot: int, position: int) -> bytes:
        return blake2b(array("i", self._tokens[slot][: position + 1]).tobytes(), digest_size=8).digest()
