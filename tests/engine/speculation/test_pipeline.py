"""The pipelined loop with drafters gives what the plain loop gives without any, whatever comes and goes meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.draft_model import ModelDrafter
from slipstream.drafter.head import layout
from slipstream.drafter.head.drafter import FirstHead, HeadDrafter
from slipstream.drafter.lookup import NGramDrafter, SuffixDrafter
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams, SpeculationParams
from slipstream.engine.models.config import DecoderConfig, decoder_config
from slipstream.engine.models.loader import build_model
from slipstream.engine.operations import ResetPrefixCache, SwapDrafter
from slipstream.engine.plan import StepPlan, StepResult, StepWork
from slipstream.engine.runner.runner import Launched
from slipstream.engine.speculation.oracles import OracleDrafter, TreeOracleDrafter
from slipstream.engine.speculation.protocol import Drafter, DraftRow
from slipstream.engine.testing.local import Completion, LocalEngine
from slipstream.kernels.compute import Formats

Engine = Callable[..., LocalEngine]
Answers = dict[tuple[int, ...], list[int]]
LENGTH = 40
WAIT_S = 300.0


def random_head(target: DecoderConfig) -> FirstHead:
    config = layout.config_for(target, 8)
    return FirstHead(config, layout.random_tensors(config, 0))


def drafters(kind: str, tiny: Path, answers: Answers) -> tuple[list[Drafter], dict[str, Any]]:
    """With options of the engine that they need."""

    def same_model(_: Any, length: int) -> Any:
        options = EngineConfig(model=str(tiny), dtype="float32")
        return build_model(open_checkpoint(str(tiny)), options, Formats.of(torch.float32), torch.device("cpu"), length)

    lookups = [NGramDrafter(), SuffixDrafter(10_000)]
    kinds: dict[str, tuple[list[Drafter], dict[str, Any]]] = {
        "none": ([], {}),
        "lookups": (lookups, {}),
        "head": ([HeadDrafter(random_head, stop_below=0.0)], {}),
        "head tree": ([HeadDrafter(random_head, stop_below=0.0, width=3)], {"draft_width": 3}),
        "draft tree": ([ModelDrafter(same_model, stop_below=0.0, width=3)], {"draft_width": 3}),
        "oracle": ([OracleDrafter(answers, 0.8)], {"speculation_policy": "bandit"}),
        "oracle tree": ([TreeOracleDrafter(answers, 0.9, 8)], {"draft_width": 2, "max_draft_tokens": 7}),
        "all": (
            [*lookups, HeadDrafter(random_head, width=3), ModelDrafter(same_model), OracleDrafter(answers, 0.7)],
            {"draft_width": 3, "speculation_policy": "throughput"},
        ),
    }
    return kinds[kind]


@pytest.fixture(scope="session")
def expected(engine: Engine) -> Callable[[tuple[int, ...], SamplingParams], Completion]:
    """What the plain loop tells a request that is alone, without drafters."""
    plain = engine(max_model_len=64)

    @cache
    def answer(prompt: tuple[int, ...], which: int) -> Completion:
        return plain.generate([prompt], sampling(which))[0]

    return lambda prompt, params: answer(prompt, PARAMS.index(params))


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> list[Path]:
    config = layout.config_for(decoder_config(open_checkpoint(str(tiny)).config), 8)
    folders = [tmp_path_factory.mktemp("head") for _ in range(3)]
    for seed, folder in enumerate(folders):
        layout.write(folder / "v", config, layout.random_tensors(config, seed))
    return [folder / "v" for folder in folders]


NESTED = 'start: (word | "(" start ")")*\nword: "a" | "b" "a"* "b"'
"""Tokens stand for one byte or for two, so that the grammar's symbols end in the middle of them."""
PARAMS = [
    SamplingParams(max_tokens=LENGTH, temperature=0.0),
    SamplingParams(max_tokens=LENGTH, temperature=0.8, seed=5, logprobs=1),
    SamplingParams(max_tokens=LENGTH, seed=7, top_p=0.8, frequency_penalty=0.4, stop_token_ids=(6,)),
    SamplingParams(max_tokens=3, seed=9, stop_token_ids=(2,)),
    SamplingParams(max_tokens=LENGTH, temperature=0.0, stop_token_ids=(7,), grammar=NESTED),
    SamplingParams(
        max_tokens=LENGTH,
        seed=3,
        temperature=1.5,
        logprobs=2,
        repetition_penalty=1.1,
        min_tokens=6,
        stop_token_ids=(7, 3),
        grammar=NESTED,
    ),
    SamplingParams(max_tokens=9, seed=4, temperature=1.5, stop_token_ids=(7,), grammar=NESTED, ends_in_time=True),
]


def sampling(which: int) -> SamplingParams:
    return PARAMS[which]


arrivals = st.tuples(
    st.lists(st.integers(0, 7), min_size=1, max_size=6).map(lambda text: tuple(text * (len(text) % 4 * 3 + 1))),
    st.integers(0, len(PARAMS) - 1),
    st.sampled_from(["auto", "auto", "auto", "off"]),
    st.sampled_from(["", "trial"]),
    st.sampled_from([0, 0, -1]),
)
actions = st.lists(
    st.one_of(
        *(arrivals, arrivals, arrivals, arrivals),
        *(st.integers(1, 4), st.integers(1, 4)),  # steps
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("swap"), st.integers(0, 2), st.sampled_from(["", "trial"])),
        st.just("reset"),
    ),
    min_size=8,
    max_size=40,
)


def pace(local: LocalEngine) -> None:
    """Every step takes as long as on a machine that reads weights most of the time: what policies decide by time, they
    decide alike everywhere, however busy the machine is.
    """
    runner, collect = local.engine.runner, local.engine.runner.collect

    def timed(launched: Launched) -> StepResult:
        return replace(collect(launched), seconds=0.01, draft_seconds=0.0005)

    runner.collect = timed  # type: ignore[method-assign]
    local.engine.scheduler.cost.calibrate([(StepWork().add(0, tokens), 0.01) for tokens in (1, 256)], [])


AHEAD = [pytest.param(kind, True, id=f"{kind}, ahead") for kind in ("none", "all")]
KINDS = ["lookups", "head", "head tree", "draft tree", "oracle", "oracle tree", "all"]


@pytest.mark.parametrize(("kind", "ahead"), [*[pytest.param(kind, False, id=kind) for kind in KINDS], *AHEAD])
def test_whatever_happens_tokens_are_those_of_the_plain_loop(
    engine: Engine, tiny: Path, expected: Any, heads: list[Path], kind: str, ahead: bool
) -> None:
    """``ahead``: steps are launched before the last one is read, as on a GPU."""
    answers: Answers = {}
    chosen, fields = drafters(kind, tiny, answers)
    small = {"kv_cache_memory": "32KiB", "max_model_len": 64, "max_running": 4}
    local = engine(chosen, pipeline="on", **(small | fields), **({"kernels": "torch"} if ahead else {}))
    pace(local)
    runner = local.engine.runner
    runner.runs_ahead, fits_behind, behind = ahead, runner.fits_behind, []

    def counted(plan: StepPlan, before: Launched) -> bool:
        behind.append(fits_behind(plan, before))
        return behind[-1]

    runner.fits_behind = counted  # type: ignore[method-assign]

    def play(script: Sequence[Any]) -> None:
        submitted: list[tuple[Completion, tuple[int, ...], SamplingParams]] = []
        aborted: set[int] = set()
        swaps: list[Any] = []
        for action in script:
            match action:
                case int():
                    for _ in range(action):
                        local.step()
                case "reset":
                    local.engine.operate(ResetPrefixCache())
                case ("abort", which):
                    if which < len(submitted):
                        aborted.add(which)
                        local.engine.scheduler.abort([submitted[which][0].request_id])
                case ("swap", version, route):
                    if "head" in local.engine.runner.speculator.names:
                        swap = SwapDrafter(version + 2, route, str(heads[version]))
                        swaps.append(local.engine.operate(swap))
                case (prompt, which, mode, route, priority):
                    params = sampling(which)
                    answers[prompt] = expected(prompt, params).tokens
                    more = {"route": route, "priority": priority, "speculation": SpeculationParams(mode)}
                    submitted.append((local.submit(prompt, params, **more), prompt, params))
        deadline = time.monotonic() + WAIT_S
        while not all(swap.done() for swap in swaps):
            assert time.monotonic() < deadline
            local.step() if local.engine.core.has_work else local.engine.poll()
        local.finish()
        for number, (completion, prompt, params) in enumerate(submitted):
            plain = expected(prompt, params)
            if completion.finish_reason == "abort":
                assert number in aborted and completion.tokens == plain.tokens[: len(completion.tokens)]
            else:
                assert completion.tokens == plain.tokens
                assert completion.finish_reason == plain.finish_reason

    settings(max_examples=20)(given(actions)(play))()
    drafted = sum(entry.draft_tokens for entry in local.stats.drafters)
    right = sum(delta.num_accepted for done in local.completions.values() for delta in done.deltas)
    assert kind == "none" or drafted > 100, "too little was drafted for this to say anything"
    assert kind in ("none", "head", "head tree") or right > 50, "too little was right for this to say anything"
    assert sum(behind) > 50 or (kind, ahead) != ("none", True), "too few steps were ahead for this to say anything"
    assert local.stats.preemptions, "the cache has to be too small for this test to say anything"
    local.close()


def test_drafts_are_verified_in_every_step_of_the_pipelined_loop(engine: Engine, expected: Any) -> None:
    """It takes as many steps as the plain loop with the same drafter, but for the first ones and one after the end."""
    prompt, answers = (1, 2, 3), Answers()
    params = PARAMS[1]
    answers[prompt] = expected(prompt, params).tokens

    def steps(pipeline: str) -> int:
        local = engine([OracleDrafter(answers, 1.0)], pipeline=pipeline)
        [done] = local.generate([prompt], params)
        local.close()
        assert done.tokens == answers[prompt]
        assert sum(delta.num_accepted for delta in done.deltas) > LENGTH / 2
        return local.stats.steps

    assert steps("off") < steps("on") <= steps("off") + 4


class Hearing(OracleDrafter):
    """Notes the text of requests that have ended."""

    def __init__(self, answers: Answers) -> None:
        super().__init__(answers, 1.0)
        self.heard: set[tuple[int, ...]] = set()

    def finish(self, row: DraftRow) -> None:
        self.heard.add(tuple(row.known.tolist()))


@pytest.mark.parametrize("pipeline", ["off", "on"])
def test_drafters_learn_from_what_was_said_and_not_from_what_was_sampled_beyond(
    engine: Engine, expected: Any, pipeline: str
) -> None:
    answers: Answers = {}
    drafter = Hearing(answers)
    local = engine([drafter], pipeline=pipeline)
    for number, params in enumerate(2 * [params for params in PARAMS if not params.grammar]):
        prompt = (number, number, 3)
        stopped = expected(prompt, params).tokens
        # What the drafter knows goes on after the end, so accepted draft tokens reach beyond it.
        longer = msgspec.structs.replace(params, max_tokens=LENGTH, stop_token_ids=())
        answers[prompt] = local.generate([prompt], longer)[0].tokens
        local.generate([[7]], SamplingParams(max_tokens=1))  # ends are told with the next plan
        drafter.heard.clear()
        [done] = local.generate([prompt], params)
        assert done.tokens == stopped
        local.generate([[7]], SamplingParams(max_tokens=1))
        assert {text for text in drafter.heard if text[:3] == prompt} == {(*prompt, *stopped)}
    local.close()


def test_what_was_prepared_beside_the_steps_lands_between_two_of_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = engine(pipeline="on")
    local.submit([1, 2, 3], SamplingParams(max_tokens=200, seed=1))
    for _ in range(3):
        local.step()
    landed: list[int] = []
    background = local.engine.background

    def whole_turn(_: float) -> None:
        """However busy the machine is: else the request may end before the thread has had a moment."""
        assert background._turn.wait_for(lambda: not background._has_turn, WAIT_S)

    monkeypatch.setattr(background, "_wait", whole_turn)
    done = background.start(lambda: lambda: landed.append(local.engine.scheduler.num_under_way))
    deadline = time.monotonic() + WAIT_S
    while not done.done():
        assert time.monotonic() < deadline
        assert local.engine.scheduler.num_under_way == 1, "a step has to be under way for this test to say anything"
        local.step()
    assert landed == [0]
    local.finish()
    local.close()
