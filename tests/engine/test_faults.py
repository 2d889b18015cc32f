"""Nothing that one request contains ends the engine, and the requests beside it get what they get alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.engine.config import EngineConfig
from slipstream.engine.core import MOST_FAILURES
from slipstream.engine.listening import EndedRequest, Listener
from slipstream.engine.messages import NewRequest, SamplingParams, SpeculationParams, TrafficStats
from slipstream.engine.models.protocol import CausalModel, Forward
from slipstream.engine.speculation.protocol import Computed, Drafter, DraftRow, Proposal
from slipstream.engine.testing.local import TINY_LLAMA, Completion, LocalEngine, policy, write_policy

VOCAB = TINY_LLAMA["vocab_size"]
BROKEN = VOCAB - 1
"""A token whose embedding is not a number."""
GOOD_TOKENS = tuple(range(BROKEN))
Make = Callable[..., LocalEngine]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = policy(0, TINY_LLAMA, 20)
    tensors["model.embed_tokens.weight"][BROKEN] = float("nan")
    return write_policy(tmp_path_factory.mktemp("model"), tensors, TINY_LLAMA)


@pytest.fixture(scope="module", params=["native", "torch"])
def make(request: pytest.FixtureRequest, folder: Path) -> Make:
    def start(drafters: Sequence[Drafter] = (), listeners: Sequence[Listener] = (), **fields: Any) -> LocalEngine:
        options = {"dtype": "float32", "kv_cache_memory": "4MiB", "max_running": 8, "threads": 1}
        options["kernels"] = request.param
        return LocalEngine(EngineConfig(model=str(folder), **(options | fields)), drafters, listeners)

    return start


@pytest.fixture(scope="module")
def engine(make: Make) -> Iterator[LocalEngine]:
    started = make()
    yield started
    started.close()


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 6, "seed": 5, "allowed_token_ids": GOOD_TOKENS} | fields))


HEALTHY = [
    ([1, 2, 3], params(temperature=0.0)),
    ([4] * 20, params(temperature=1.0, top_p=0.9)),
    (list(range(30)), params(temperature=0.7, frequency_penalty=0.5, logprobs=2)),
]


def start_healthy(engine: LocalEngine) -> list[Completion]:
    return [engine.submit(prompt, sampling) for prompt, sampling in HEALTHY]


@pytest.fixture(scope="module")
def alone(engine: LocalEngine) -> list[list[int]]:
    """What the healthy requests are told one after the other."""
    found = [engine.generate([prompt], sampling)[0] for prompt, sampling in HEALTHY]
    assert all(len(completion.tokens) == 6 for completion in found)
    return [completion.tokens for completion in found]


def error_of(completion: Completion) -> str:
    assert completion.finish_reason == "error" and completion.deltas[-1].error
    return completion.deltas[-1].error


any_id = st.integers(0, VOCAB - 1) | st.sampled_from([-1, VOCAB, 2**31, -(2**31) - 1, 2**63, 2**70])
extreme = st.sampled_from([0.0, -0.0, 5e-324, 1e-45, 1e-42, 1e-38, 1e-7, 0.5, 1.0, 2.0, 10.0, 1e308, -1e-42, -2.0])
number = extreme | st.floats()
whole = st.integers(0, 8) | st.sampled_from([-1, 2**31 - 1, 2**31, 2**63, 2**64, 10**400])
hostile_params = st.fixed_dictionaries(
    {},
    optional={
        "temperature": number,
        "top_p": number,
        "top_k": whole,
        "min_p": number,
        "frequency_penalty": number,
        "presence_penalty": number,
        "repetition_penalty": number,
        "logit_bias": st.dictionaries(any_id, number, max_size=3),
        "allowed_token_ids": st.lists(any_id, max_size=4).map(tuple),
        "bad_words": st.lists(st.lists(any_id, max_size=2).map(tuple), max_size=2).map(tuple),
        "stop_token_ids": st.lists(any_id, max_size=3).map(tuple),
        "seed": whole,
        "min_tokens": st.integers(0, 6) | whole,
        "logprobs": whole,
        "prompt_logprobs": whole,
        "logprobs_mode": st.sampled_from(["raw", "processed"]),
    },
)
hostile = st.tuples(st.lists(any_id, max_size=40), hostile_params)


@settings(max_examples=20)
@given(requests=st.lists(hostile, min_size=1, max_size=3), trusting=st.booleans())
def test_healthy_requests_never_notice_hostile_ones(
    engine: LocalEngine, alone: list[list[int]], requests: list[tuple[list[int], dict[str, Any]]], trusting: bool
) -> None:
    """With ``trusting``, ids of the parameters and numbers get past the check, as if it had forgotten a field."""
    healthy = start_healthy(engine)
    submitted = []
    for prompt, fields in requests:
        sampling = SamplingParams(max_tokens=3, **fields)
        if not trusting:
            submitted.append(engine.submit(prompt, sampling))
        elif prompt and all(0 <= token < VOCAB for token in prompt):
            submitted.append(submit_unchecked(engine, prompt, sampling))
    engine.finish()
    assert [completion.tokens for completion in healthy] == alone
    for completion in submitted:
        assert completion.finish_reason in ("stop", "length", "error")
        assert all(0 <= token < VOCAB for token in completion.tokens)


def submit_unchecked(engine: LocalEngine, prompt: list[int], sampling: SamplingParams) -> Completion:
    completion = Completion(len(engine.completions) + 1)
    engine.completions[completion.request_id] = completion
    engine.engine.scheduler.add(NewRequest(request_id=completion.request_id, prompt=prompt, params=sampling))
    return completion


@pytest.mark.parametrize("prompt", [[1, VOCAB], [-1, 1], [], [1] * 1000, [2**40]])
def test_a_prompt_that_the_model_does_not_have_is_refused(engine: LocalEngine, prompt: list[int]) -> None:
    assert "prompt" in error_of(engine.generate([prompt], SamplingParams(max_tokens=3))[0])


def test_a_row_that_cannot_be_sampled_is_that_request_s_error(engine: LocalEngine, alone: list[list[int]]) -> None:
    healthy = start_healthy(engine)
    wrong = [
        submit_unchecked(engine, [1, 2], SamplingParams(max_tokens=3, logit_bias={10**6: 1.0})),
        submit_unchecked(engine, [1, 2], SamplingParams(max_tokens=3, temperature=0.5, top_k=2**40)),
    ]
    nothing = engine.submit([1, 2], SamplingParams(max_tokens=3, allowed_token_ids=(5,), bad_words=((5,),)))
    engine.finish()
    assert [completion.tokens for completion in healthy] == alone
    for completion in wrong:
        assert "could not be computed" in error_of(completion)
    assert "leave no token" in error_of(nothing)


@pytest.mark.parametrize("pipeline", ["off", "on"])
def test_numbers_that_are_none_stay_with_their_request(make: Make, alone: list[list[int]], pipeline: str) -> None:
    """Also in what they leave in the cache, which others get after them."""
    engine = make(pipeline=pipeline, kv_cache_memory="1MiB", max_model_len=64)
    for _ in range(3):
        healthy = start_healthy(engine)
        broken = [engine.submit([BROKEN] * 50, params()) for _ in range(3)]
        scored = engine.submit([1, BROKEN, 3, 4], params(prompt_logprobs=2))
        engine.finish()
        assert [completion.tokens for completion in healthy] == alone
        for completion in [*broken, scored]:
            assert "not finite" in error_of(completion)
    engine.close()


class Failing:
    """A model whose forward pass raises while a token is in the batch."""

    def __init__(self, model: Any, token: int, times: int = 10**6) -> None:
        self._model, self._token, self._times = model, token, times

    def forward(self, batch: Any, cache: Any, taps: tuple[int, ...] = ()) -> Forward:
        computed: Forward = self._model.forward(batch, cache, taps)
        if self._token in batch.token_ids and self._times:
            self._times -= 1
            cache._data.fill_(float("nan"))
            raise RuntimeError("the device has lost its mind")
        return computed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@pytest.mark.parametrize("pipeline", ["off", "on"])
def test_a_failed_step_ends_its_requests_and_no_others(make: Make, alone: list[list[int]], pipeline: str) -> None:
    engine = make(pipeline=pipeline, max_running=3)
    runner: Any = engine.engine.runner
    runner.model = Failing(runner.model, 33)
    early = [engine.submit([7], params(temperature=0.0, stop_token_ids=(33,), min_tokens=6)) for _ in range(2)]
    engine.step()
    wrong = engine.submit([33, 1], params(), priority=-5)
    healthy = start_healthy(engine)  # they wait
    engine.finish()
    assert "lost its mind" in error_of(wrong)
    assert all(completion.finish_reason in ("error", "length") for completion in early)
    assert [completion.tokens for completion in healthy] == alone
    assert [completion.tokens for completion in start_and_finish(engine)] == alone
    engine.close()


def start_and_finish(engine: LocalEngine) -> list[Completion]:
    healthy = start_healthy(engine)
    engine.finish()
    return healthy


def test_an_engine_that_only_fails_ends(make: Make) -> None:
    engine = make()
    runner: Any = engine.engine.runner
    runner.model = Failing(runner.model, 1)
    for _ in range(MOST_FAILURES - 1):
        assert "lost its mind" in error_of(engine.generate([[1]], params())[0])
    with pytest.raises(RuntimeError, match="lost its mind"):
        engine.generate([[1]], params())


class RaisingDrafter(Drafter):
    """Fails in one way or another where a request's prompt begins with a number of its list."""

    name = "raising"
    num_evidence = 1

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        return [self._propose(row) for row in rows]

    def _propose(self, row: DraftRow) -> Proposal | None:
        match int(row.tokens[0]):
            case 1:
                raise ArithmeticError("no idea")
            case 4:
                return Proposal.chain([VOCAB + 5], 0)
            case 5:
                return Proposal.chain([-1], 0)
            case 6:
                return Proposal([1, 2], [1, -1], [0, 0])
            case 7:
                return Proposal.chain([1], 9)
            case 8:
                return Proposal.chain([1] * (row.most + 1), 0)
        return Proposal.chain([1] * row.most, 0)

    def finish(self, row: DraftRow) -> None:
        raise ArithmeticError("nothing to learn")


def test_a_drafter_that_fails_changes_no_token(
    make: Make, alone: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [[first, 2, 3] for first in (5, 6, 7, 8)]
    plain = make()
    expected = [plain.generate([prompt], params())[0].tokens for prompt in prompts]
    plain.close()
    engine = make([RaisingDrafter()], speculation_policy="fixed", max_draft_tokens=3)
    healthy = start_healthy(engine)
    others = [engine.submit(prompt, params()) for prompt in prompts]
    engine.submit([9], params(), speculation=SpeculationParams("off"))
    engine.finish()
    assert [completion.tokens for completion in healthy] == alone
    assert [completion.tokens for completion in others] == expected
    assert engine.stats.drafters[0].drafts > 0, "it still drafts where it does not fail"
    assert [completion.tokens for completion in start_and_finish(engine)] == alone
    told = [record for record in caplog.records if "drafter raising" in record.getMessage()]
    assert len(told) == 2, "each kind of failure is told once"
    engine.close()


class RaisingListener(Listener):
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def begin(self, request: NewRequest) -> None:
        if request.prompt[0] == 1:
            raise OSError("the disk is full")

    def target_changed(self, version: int, model: CausalModel) -> None:
        raise OSError("the disk is full")

    def observe(self, computed: Sequence[Computed]) -> None:
        raise OSError("the disk is full")

    def finish(self, ended: EndedRequest) -> None:
        self.reasons.append(ended.reason)
        raise OSError("the disk is full")

    @property
    def stats(self) -> TrafficStats:
        return TrafficStats()


def test_a_listener_that_fails_costs_no_request(make: Make, alone: list[list[int]]) -> None:
    listener = RaisingListener()
    engine = make(listeners=[listener])
    healthy = [engine.submit(prompt, sampling, traffic="features") for prompt, sampling in HEALTHY]
    engine.engine.listeners.target_changed(1, engine.engine.loaded.model)
    engine.finish()
    assert [completion.tokens for completion in healthy] == alone
    assert sorted(listener.reasons) == ["error", "length", "length"], "what it has not heard whole is not kept"
    engine.close()
