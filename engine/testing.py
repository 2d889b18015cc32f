"""An engine without processes or sockets, for tests and experiments of every room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import EngineStats, NewRequest, SamplingParams, TokenDelta
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
