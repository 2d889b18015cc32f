"""An engine without processes or sockets, for tests and experiments of every room."""

from __future__ import annotations

import json
import time
from array import array
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.config import EngineConfig
from slipstream.engine.listening import Listener
from slipstream.engine.messages import EngineStats, NewRequest, SamplingParams, TokenDelta
from slipstream.engine.operations import Operation, UpdateMode
from slipstream.engine.plan import NewRow, StepPlan, StepResult
from slipstream.engine.process import Engine
from slipstream.engine.scheduling.scheduler import Scheduler
from slipstream.engine.scheduling.step_cost import StepCost
from slipstream.engine.speculation.protocol import Drafter, DraftNeeds

TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
"""config.json of a model that is small enough for tests, and has what models have."""
POLICY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
"""config.json of a model that is smaller still, for tests in which a trainer changes its weights."""


def policy(seed: int, config: dict[str, Any] = POLICY, times: int = 10) -> dict[str, Tensor]:
    """Weights that are large, so that the next token depends on those before it, and on the seed."""
    return {name: tensor * (times if tensor.ndim == 2 else 1) for name, tensor in dummy_tensors(config, seed)}


def telling_policy(version: int) -> dict[str, Tensor]:
    """Weights with which every token is their version, modulo the vocabulary; made of parts of several versions, they
    say others.

    Half of the hidden state says what the embedding is, the other half what values the tokens before had: keys and
    values of another version make the token less likely than it should be.
    """
    size = POLICY["vocab_size"]
    said = (8 * version) % size
    tensors = {name: torch.zeros_like(tensor) for name, tensor in dummy_tensors(POLICY, 0)}
    tensors["model.embed_tokens.weight"][:, said] = 1.0
    unit = torch.eye(size)
    heard = unit.roll(7 * version, 1)
    tensors["lm_head.weight"].copy_(torch.cat((heard, heard), 1))
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        elif name.endswith("v_proj.weight"):
            tensor[:, :size] = unit.roll(3 * version, 0)
        elif name.endswith("o_proj.weight"):
            tensor[size:, :size] = unit.roll(3 * version, 1) / 16
    return tensors


def write_policy(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] = POLICY) -> Path:
    """A folder with a model of these weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


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

    def __init__(
        self, config: EngineConfig, drafters: Sequence[Drafter] = (), listeners: Sequence[Listener] = ()
    ) -> None:
        self.completions: dict[int, Completion] = {}
        self.stats = EngineStats()
        self.engine = Engine(config, self._deliver, drafters, listeners)

    def submit(self, prompt: Sequence[int], params: SamplingParams, **fields: object) -> Completion:
        completion = Completion(len(self.completions) + 1)
        self.completions[completion.request_id] = completion
        request = NewRequest(request_id=completion.request_id, prompt=list(prompt), params=params, **fields)  # type: ignore[arg-type]
        self.engine.submit(request)
        return completion

    def step(self) -> None:
        self.engine.poll()
        self.engine.core.step()

    def operate(self, *operations: Operation[Any]) -> Any:
        """Carries them out one after the other, with steps in between; the answer to the last one."""
        answer = None
        for operation in operations:
            answer = self.wait(self.engine.operate(operation))
        return answer

    def wait(self, done: Future[Any]) -> Any:
        """Steps until it is done."""
        while not done.done():
            if self.engine.core.has_work:
                self.step()
            else:
                self.engine.poll()
                time.sleep(0.001)  # other threads have the interpreter meanwhile
        return done.result()

    def finish(self) -> None:
        """Steps until nothing is left to do, then checks the books."""
        while self.engine.core.has_work or self.engine.has_background_work:
            self.step()
        self.engine.scheduler.check_integrity()

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """Generates from all prompts at once."""
        completions = [self.submit(prompt, params) for prompt in prompts]
        self.finish()
        return completions

    def close(self) -> None:
        self.engine.close()

    def _deliver(self, deltas: list[TokenDelta], stats: EngineStats) -> None:
        self.stats = stats
        for delta in deltas:
            completion = self.completions[delta.request_id]
            assert completion.finish_reason is None, "a request was told something after its end"
            completion.deltas.append(delta)


def simulated_token(history: Sequence[int], vocab: int, weights: int = 0) -> int:
    """The next token of the model that SimulatedRunner stands for: a hash of everything before it, and its weights."""
    digest = blake2b(array("i", history).tobytes(), digest_size=8, salt=weights.to_bytes(4, "little")).digest()
    return int.from_bytes(digest, "little") % vocab


def simulated_answer(
    prompt: list[int], max_tokens: int, stop: tuple[int, ...] = (), max_len: int = 200, vocab_size: int = 40
) -> list[int]:
    """What a request must get of the model that SimulatedRunner stands for, however it is scheduled."""
    history = list(prompt)
    while len(history) - len(prompt) < max_tokens and len(history) < max_len:
        history.append(simulated_token(history, vocab_size))
        if history[-1] in stop:
            break
    return history[len(prompt) :]


class SimulatedRunner:
    """Executes plans without a model and checks that every read of the cache would find the right content.

    A cache position holds a digest of all tokens up to and including its own, which is what real keys and values
    depend on, of whether the sequence was longer than the switch length, and of the weights. A step that attends to a
    position holding anything else is an error in scheduling or block sharing; only a row that was there when the
    weights changed may read what older ones made.
    With ``right``, it proposes at every chance, each draft token being right with this probability.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        vocab: int,
        max_len: int,
        right: float | None = None,
        switch_length: int = 0,
    ) -> None:
        self._block_size = block_size
        self._max_len = max_len
        self._switch_length = switch_length
        self._vocab = vocab
        self._cells: list[bytes | None] = [None] * (num_blocks * block_size)
        self._rows: dict[int, NewRow] = {}
        self._tokens: dict[int, list[int]] = {}
        self._tables: dict[int, dict[int, int]] = {}
        self._right = right
        self._random = Random(0)
        self.weights = 0
        """Number of the weights that it computes with, to be raised between two steps."""
        self._entered: dict[int, int] = {}
        """The weights with which each row began."""
        self._drafts: dict[int, list[int]] = {}
        self.tokens_computed = 0

    def execute(self, plan: StepPlan) -> StepResult:
        for slot, length in plan.ended:
            assert length <= len(self._tokens[slot]), "a request has ended with tokens that were not sampled"
            del self._rows[slot]
        for new in plan.new:
            self._rows[new.slot], self._entered[new.slot] = new, self.weights
            self._tokens[new.slot] = list(new.tokens)
            self._tables[new.slot] = {}
            self._drafts.pop(new.slot, None)
        for slot, first, blocks in plan.blocks:
            self._tables[slot].update(enumerate(blocks, first))
        size = self._block_size
        copied = [self._cells[source * size : (source + 1) * size] for source, _ in plan.copies]
        for (_, destination), cells in zip(plan.copies, copied, strict=True):
            self._cells[destination * size : (destination + 1) * size] = cells
        drafted = [self._take_drafts(slot, most) for slot, most in zip(plan.slots, plan.drafts, strict=True)]
        starts = [self._start(plan, row, drafted[row]) for row in range(len(plan.slots))]
        rows = list(zip(plan.slots, starts, plan.counts, drafted, strict=True))
        assert len({slot for slot, *_ in rows}) == len(rows), "a row is in the step twice"
        for slot, start, count, drafts in rows:
            assert start + count + drafts <= self._max_len, "a position beyond the context is computed"
            for position in range(start, start + count + drafts):
                self._cells[self._cell(slot, position)] = self._digest(slot, position, drafts, self.weights)
            self.tokens_computed += count + drafts
        for slot, start, count, drafts in rows:
            for position in range(start + count + drafts):
                found = self._cells[self._cell(slot, position)]
                known = range(self._entered[slot], self.weights + 1)
                assert found in [self._digest(slot, position, drafts, each) for each in known], "stale keys and values"
        sampled = [
            self._sample(slot, drafts) if wanted else []
            for (slot, _, _, drafts), wanted in zip(rows, plan.samples, strict=True)
        ]
        offers = [self._propose(slot, most) for slot, most in zip(plan.slots, plan.wanted, strict=True)]
        return StepResult(sampled, drafted, offers, {}, {}, {}, seconds=0.001)

    def _take_drafts(self, slot: int, most: int) -> int:
        """Puts the first draft tokens behind the known tokens; how many these are."""
        assert slot in self._rows, "a row is computed after its request has ended"
        drafts = self._drafts.pop(slot, [])[:most]
        self._tokens[slot] += drafts
        return len(drafts)

    def _start(self, plan: StepPlan, row: int, drafts: int) -> int:
        """Where the row starts: one that samples ends with its last known token."""
        if not plan.samples[row]:
            return plan.starts[row]
        start = len(self._tokens[plan.slots[row]]) - drafts - plan.counts[row]
        assert 0 <= start <= plan.starts[row], "a row starts later than its plan says"
        return start

    def _sample(self, slot: int, drafted: int) -> list[int]:
        tokens = self._tokens[slot]
        drafts = tokens[len(tokens) - drafted :]
        del tokens[len(tokens) - drafted :]
        sampled = []
        for draft in [*drafts, None]:
            sampled.append(simulated_token(tokens, self._vocab, self.weights))
            tokens.append(sampled[-1])
            if sampled[-1] != draft:
                break
        return sampled

    def _propose(self, slot: int, most: int) -> tuple[float, ...]:
        if self._right is None or not most:
            return ()
        tokens = list(self._tokens[slot])
        drafts = []
        for _ in range(self._random.randint(0, most)):
            truth = simulated_token(tokens, self._vocab, self.weights)
            drafts.append(truth if self._random.random() < self._right else (truth + 1) % self._vocab)
            tokens.append(drafts[-1])
        self._drafts[slot] = drafts
        return tuple(self._right**i for i in range(1, len(drafts) + 1))

    def _cell(self, slot: int, position: int) -> int:
        return self._tables[slot][position // self._block_size] * self._block_size + position % self._block_size

    def _digest(self, slot: int, position: int, drafts: int, weights: int) -> bytes:
        tokens = self._tokens[slot]
        is_long = bool(self._switch_length) and len(tokens) - drafts > self._switch_length
        content = array("i", [weights, is_long, *tokens[: position + 1]])
        return blake2b(content.tobytes(), digest_size=8).digest()


class SimulatedLoop:
    """The step loop with `ahead` plans under way before the first is committed; ahead 0 is the plain loop."""

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int = 30,
        max_len: int = 200,
        ahead: int = 0,
        right: float | None = None,
        vocab_size: int = 40,
        switch_length: int = 0,
    ) -> None:
        self.now = 0.0
        self.cost = StepCost()
        drafting = DraftNeeds(0 if right is None else config.max_draft_tokens)
        self.scheduler = Scheduler(config, num_blocks, max_len, self.cost, lambda: self.now, switch_length, drafting)
        self.runner = SimulatedRunner(num_blocks, config.block_size, vocab_size, max_len, right, switch_length)
        self.plans: list[StepPlan] = []
        self.told: dict[int, list[TokenDelta]] = {}
        self._ahead = ahead
        self._queue: deque[StepPlan] = deque()

    def add(self, request_id: int, prompt: list[int], max_tokens: int = 5, **fields: object) -> None:
        stop = fields.pop("stop_token_ids", ())
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop)  # type: ignore[arg-type]
        self.now += 0.001
        self.told[request_id] = []
        self.scheduler.add(
            NewRequest(request_id=request_id, prompt=prompt, params=params, arrival=self.now, **fields)  # type: ignore[arg-type]
        )

    def step(self) -> StepPlan | None:
        self.now += 0.01
        plan = self.scheduler.schedule()
        if plan is not None:
            self.plans.append(plan)
            self._queue.append(plan)
        if self._queue and (len(self._queue) > self._ahead or plan is None):
            self._commit()
        else:
            self._tell(self.scheduler.take_ended())
        self.scheduler.check_integrity()
        return plan

    def drain(self) -> None:
        while self._queue:
            self._commit()

    def use_target(self, mode: UpdateMode) -> None:
        """The model has other weights from now on, of the next version."""
        self.drain()
        self.runner.weights += 1
        self.scheduler.use_target(self.runner.weights, mode)

    def finish(self, most: int = 5000) -> None:
        for _ in range(most):
            if not self.scheduler.has_work and not self._queue:
                break
            self.step()
        else:
            raise AssertionError("the scheduler does not come to an end")
        assert self.scheduler.kv.pool.num_used == 0

    def tokens(self, request_id: int) -> list[int]:
        return [token for delta in self.told[request_id] for token in delta.tokens]

    def reason(self, request_id: int) -> str | None:
        return self.told[request_id][-1].finish_reason if self.told[request_id] else None

    def _commit(self) -> None:
        done = self._queue.popleft()
        self._tell(self.scheduler.commit(done, self.runner.execute(done)))

    def _tell(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            told = self.told[delta.request_id]
            assert not told or told[-1].finish_reason is None, "a request was told something after its end"
            told.append(delta)
