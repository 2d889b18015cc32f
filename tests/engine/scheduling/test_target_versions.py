"""Pauses, and updates of the target's weights, as the scheduler sees them: under any traffic, in any mode."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.config import EngineConfig
from slipstream.engine.operations import PauseMode, UpdateMode
from slipstream.engine.testing.local import SimulatedLoop, simulated_token

VOCAB = 40
UPDATE_MODES, PAUSE_MODES = get_args(UpdateMode), get_args(PauseMode)


def make_loop(ahead: int = 0, right: float | None = None, **fields: Any) -> SimulatedLoop:
    options = {"block_size": 4, "max_running": 4, "max_step_tokens": 24, "max_draft_tokens": 3}
    return SimulatedLoop(EngineConfig(**(options | fields)), ahead=ahead, right=right)


def check_versions(loop: SimulatedLoop, request_id: int, prompt: list[int]) -> list[int]:
    """Every token is what the weights sample that its delta names; returns the versions."""
    history, versions = list(prompt), []
    for delta in loop.told[request_id]:
        for token in delta.tokens:
            assert token == simulated_token(history, VOCAB, delta.target_version)
            history.append(token)
            versions.append(delta.target_version)
    assert versions == sorted(versions)
    return versions


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=30)  # of few tokens, so that beginnings are shared
actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), prompts, st.integers(1, 12), st.sampled_from([0, 0, -1])),
        st.tuples(st.just("add"), prompts, st.integers(1, 12), st.sampled_from([0, 0, -1])),
        st.tuples(st.just("steps"), st.integers(1, 4)),
        st.tuples(st.just("steps"), st.integers(1, 4)),
        st.tuples(st.just("abort"), st.integers(1, 12)),
        st.tuples(st.just("update"), st.sampled_from(UPDATE_MODES)),
        st.tuples(st.just("pause"), st.sampled_from(PAUSE_MODES)),
        st.just(("resume",)),
    ),
    min_size=5,
    max_size=40,
)


@given(actions, st.integers(0, 1), st.sampled_from([None, 0.7]), st.integers(8, 20))
def test_no_token_comes_of_a_mix_of_weights(script: list[Any], ahead: int, right: float | None, blocks: int) -> None:
    """The runner checks that a request that begins after an update, or begins anew, reads nothing that is older."""
    options = EngineConfig(block_size=4, max_running=4, max_step_tokens=24, max_draft_tokens=3)
    loop = SimulatedLoop(options, num_blocks=blocks, max_len=4 * blocks, ahead=ahead, right=right)
    asked: dict[int, list[int]] = {}
    aborted: set[int] = set()
    for action in script:
        match action:
            case ("add", prompt, most, priority):
                number = len(asked) + 1
                asked[number] = prompt[: 4 * blocks - 12]
                loop.add(number, asked[number], most, priority=priority)
            case ("steps", count):
                for _ in range(count):
                    loop.step()
            case ("abort", number):
                aborted.add(number)
                loop.scheduler.abort([number])
            case ("update", mode):
                aborted |= set(asked) if mode == "abort" else set()
                loop.use_target(mode)
            case ("pause", mode):
                aborted |= set(asked) if mode == "abort" else set()
                loop.drain()
                loop.scheduler.pause(mode)
            case ("resume",):
                loop.scheduler.resume()
    loop.scheduler.resume()
    loop.finish()
    for number, prompt in asked.items():
        check_versions(loop, number, prompt)
        assert loop.reason(number) in (("length", "abort") if number in aborted else ("length",))


@pytest.mark.parametrize("mode", UPDATE_MODES)
def test_who_has_waited_across_an_update_reads_no_old_block(mode: UpdateMode) -> None:
    loop = make_loop(max_running=1)
    shared = [1] * 16
    loop.add(1, [*shared, 5], 30)
    loop.add(2, [*shared, 6], 5)
    for _ in range(4):
        loop.step()
    assert loop.tokens(1) and not loop.told[2]
    loop.use_target(mode)
    loop.finish()
    first, second = check_versions(loop, 1, [*shared, 5]), check_versions(loop, 2, [*shared, 6])
    if mode == "abort":
        assert loop.reason(1) == loop.reason(2) == "abort" and set(first) == {0}
        return
    assert first[0] == 0 and first[-1] == 1 and len(first) == 30
    assert second == [1] * 5
    assert loop.told[2][0].num_cached_tokens == (16 if mode == "recompute" else 0), "only what the new weights computed"


@pytest.mark.parametrize("ahead", [0, 1])
def test_kept_requests_go_on_at_once_and_recomputed_ones_from_their_beginning(ahead: int) -> None:
    computed = {}
    for mode in ("keep", "recompute"):
        loop = make_loop(ahead)
        loop.add(1, [1] * 20, 10)
        for _ in range(5):
            loop.step()
        before = loop.runner.tokens_computed
        loop.use_target(mode)
        loop.finish()
        assert len(check_versions(loop, 1, [1] * 20)) == 10
        computed[mode] = loop.runner.tokens_computed - before
    assert computed["recompute"] - computed["keep"] >= 20


@pytest.mark.parametrize("mode", PAUSE_MODES)
def test_nothing_is_planned_in_a_pause_but_what_the_mode_says(mode: PauseMode) -> None:
    loop = make_loop(max_running=1)
    loop.add(1, [1, 2, 3], 8)
    loop.add(2, [4, 5, 6], 8)
    for _ in range(3):
        loop.step()
    begun = len(loop.tokens(1))
    loop.scheduler.pause(mode)
    loop.add(3, [7, 8], 4)
    stats = loop.scheduler.stats()
    assert stats.is_paused
    for _ in range(20):
        loop.step()
    assert loop.scheduler.is_still and not loop.scheduler.has_work, "the loop must not spin"
    assert loop.reason(1) == {"wait": "length", "abort": "abort"}.get(mode)
    assert len(loop.tokens(1)) == (8 if mode == "wait" else begun)
    assert loop.reason(2) == ("abort" if mode == "abort" else None) and not loop.told[3]
    assert (loop.scheduler.kv.pool.num_used > 0) == (mode == "keep")
    loop.scheduler.resume()
    loop.finish()
    assert loop.reason(3) == "length"
    for number, prompt in ((1, [1, 2, 3]), (2, [4, 5, 6]), (3, [7, 8])):
        check_versions(loop, number, prompt)


def test_versions_may_come_twice() -> None:
    """A trainer that begins anew counts from the same number again: its weights are others."""
    loop = make_loop()
    loop.add(1, [1] * 16, 4)
    loop.finish()
    loop.use_target("keep")
    loop.runner.weights, loop.scheduler.target_version = 7, 0
    loop.add(2, [1] * 16, 4)
    loop.finish()
    assert loop.told[2][0].num_cached_tokens == 0
