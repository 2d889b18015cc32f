"""Engine processes that die, hang or cannot come up: what was in flight ends, and another takes over."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.client import EngineClient
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import EngineDiedError, EngineLostError, ModelError
from slipstream.engine.messages import EngineStats, NewRequest, SamplingParams, StepOutputs, TokenDelta
from slipstream.engine.operations import CancelTargetUpdate, Pause, TellStepCosts
from slipstream.engine.supervisor import MAX_FAILED_STARTS, EngineSupervisor, Restarts
from slipstream.engine.wire import EngineChannel
from tests.engine.odd_engine import READY

SECONDS = 300.0
"""More than anything takes here, on a loaded machine too."""


@pytest.fixture(autouse=True)
def find_odd_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


async def start(how: str, before: EngineClient | None = None) -> EngineClient:
    return await EngineClient.start(EngineConfig(), "odd_engine", (how,), before)


def ask(engine: EngineClient) -> NewRequest:
    return NewRequest(request_id=engine.next_request_id(), prompt=[1], params=SamplingParams(max_tokens=9))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


@given(
    st.integers(0, 6),
    st.floats(1, 100),
    st.lists(st.one_of(st.none(), st.floats(0, 120)), max_size=60),
)
def test_restarts_are_bounded_within_the_window_and_go_on_otherwise(
    limit: int, window: float, lives: list[float | None]
) -> None:
    restarts = Restarts(limit, window)
    served, granted, failed = 0.0, list[float](), 0
    for life in lives:
        served += life or 0.0
        failed = failed + 1 if life is None else 0
        pause = restarts.pause(life)
        recent = [at for at in granted if at >= served - window]
        assert (pause is None) == (len(recent) >= limit or failed >= MAX_FAILED_STARTS)
        if pause is None:
            return
        granted.append(served)
        assert pause == 0 if life is not None else 0.5 <= pause <= 8


@pytest.mark.parametrize(
    "how",
    ["sends rubbish", "sends another type", "hangs up", "fails and lingers", "kills itself"],
)
async def test_whatever_an_engine_does_its_requests_and_calls_end_and_it_is_gone(how: str) -> None:
    engine = await start(how)
    process = psutil.Process(engine.pid)
    stream = engine.submit(ask(engine))
    assert [delta.tokens for delta in await stream.next()] == [[1]]
    async with asyncio.timeout(SECONDS):
        with pytest.raises(EngineDiedError):
            await engine.call(TellStepCosts())
        *_, last = [delta async for delta in stream]
        assert last.finish_reason == "error" and stream.lost
        await engine.ended.wait()
    assert not process.is_running()
    late = engine.submit(ask(engine))
    assert [delta.finish_reason for delta in await late.next()] == ["error"] and late.lost
    with pytest.raises(EngineDiedError):
        await engine.call(TellStepCosts())
    assert engine.stats.num_running == 0 and engine.num_open == 0
    await engine.close()


class Ending:
    """An engine that is nothing but the end of a channel."""

    pid = 0

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    def stop(self) -> None:
        self.ended.set()

    kill = stop

    async def wait(self) -> str:
        await self.ended.wait()
        return "it ended"


@pytest.mark.parametrize("hangs_up", [True, False])
async def test_the_last_words_of_an_engine_count_and_later_ones_do_not(
    monkeypatch: pytest.MonkeyPatch, hangs_up: bool
) -> None:
    if not hangs_up:
        monkeypatch.setattr("slipstream.engine.client.LOST_SECONDS", 0.01)
    ours, theirs = socket.socketpair()
    host, channel = Ending(), EngineChannel(theirs.detach())
    channel.send(READY)
    engine = await EngineClient.connect(ours, host)
    heard, unheard = engine.submit(ask(engine)), engine.submit(ask(engine))
    host.ended.set()  # which is known before the event loop reads what follows
    said = TokenDelta(request_id=heard.request_id, tokens=[3], finish_reason="stop")
    channel.send(StepOutputs([said], EngineStats(num_running=1, generation_tokens=1)))
    if hangs_up:
        channel.close()
    assert [delta async for delta in heard] == [said] and not heard.lost
    async with asyncio.timeout(SECONDS):
        [last] = [delta async for delta in unheard]
        await engine.ended.wait()
    assert (last.finish_reason, last.error) == ("error", "it ended") and unheard.lost
    if not hangs_up:
        seen = engine.last_step_at
        channel.send(StepOutputs([], EngineStats(num_running=2, generation_tokens=9)))
        channel.close()
        await engine._is_silent.wait()
        assert engine.last_step_at == seen
    assert (engine.stats.num_running, engine.stats.generation_tokens) == (0, 1)
    await engine.close()


async def test_an_answer_that_nobody_waits_for_is_no_harm() -> None:
    engine = await start("answers twice")
    assert await engine.call(TellStepCosts()) == {engine.pid: 0.0}
    assert await engine.call(TellStepCosts()) == {engine.pid: 0.0}
    await engine.close()


async def test_what_cannot_be_sent_leaves_no_trace() -> None:
    engine = await start("nothing")
    unsendable = ask(engine)
    unsendable = NewRequest(request_id=7, prompt=[1], params=unsendable.params, cache_salt="\ud800")
    with pytest.raises(UnicodeEncodeError):
        engine.submit(unsendable)
    assert engine.num_open == 0
    await engine.close()


@asynccontextmanager
async def supervised(
    begin: Callable[[EngineClient | None], Awaitable[EngineClient]],
    limit: int,
    hang_s: float = 0.0,
    stays_paused: Callable[[], bool] = lambda: True,
) -> AsyncIterator[tuple[EngineSupervisor, asyncio.Task[None], list[EngineClient]]]:
    engines: list[EngineClient] = []
    supervisor = EngineSupervisor(begin, Restarts(limit, 600), hang_s, engines.append, stays_paused)
    await supervisor.start()
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor, running, engines
    finally:
        running.cancel()
        await asyncio.wait({running})
        await supervisor.close()
        assert not any(psutil.pid_exists(engine.pid) for engine in engines)


async def test_another_engine_takes_over_and_counts_on() -> None:
    ids = set()
    async with supervised(lambda before: start("nothing", before), limit=2) as (supervisor, running, engines):
        for deaths in range(2):
            request = ask(supervisor.engine)
            ids.add(request.request_id)
            supervisor.engine.submit(request)
            await until(lambda total=deaths + 1: supervisor.engine.stats.generation_tokens == total)  # type: ignore[misc]
            [head] = supervisor.engine.stats.drafters
            assert (head.draft_tokens, head.accepted_per_position) == (deaths + 1, [deaths + 1])
            assert supervisor.engine.stats.num_running == 1
            os.kill(supervisor.engine.pid, 9)
            await until(lambda: not supervisor.is_up)
            assert supervisor.engine.stats.generation_tokens == deaths + 1
            assert supervisor.engine.stats.num_running == 0
            assert supervisor.seconds_left >= 1
            await until(lambda: supervisor.is_up)
            assert supervisor.engine.stats.generation_tokens == deaths + 1
        assert len(ids) == 2 and len({engine.pid for engine in engines}) == 3
        os.kill(supervisor.engine.pid, 9)
        with pytest.raises(EngineLostError, match="SIGKILL; giving up after 2 restarts"):
            async with asyncio.timeout(SECONDS):
                await running
        assert supervisor.lost


async def test_a_new_engine_is_paused_if_the_old_one_was_and_lost_weights_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with supervised(lambda before: start("nothing", before), limit=9) as (supervisor, _, engines):
        await supervisor.engine.call(Pause("keep"))
        await supervisor.engine.call(CancelTargetUpdate(7))  # which this engine takes for the end of an update
        await until(lambda: supervisor.engine.stats.is_paused and supervisor.engine.stats.target_version == 7)
        os.kill(supervisor.engine.pid, 9)
        await until(lambda: supervisor.is_up and len(engines) == 2)
        await until(lambda: supervisor.engine.stats.is_paused)
        assert supervisor.engine.stats.target_version == 0
        assert "had version 7 of the target's weights" in caplog.text
        os.kill(supervisor.engine.pid, 9)
        await until(lambda: supervisor.is_up and len(engines) == 3)
        assert caplog.text.count("send the update again") == 1


async def test_a_new_engine_does_not_pause_for_what_has_ended_with_the_old_one() -> None:
    nobody = lambda: False  # noqa: E731
    async with supervised(lambda before: start("nothing", before), 9, 0.0, nobody) as (supervisor, _, engines):
        await supervisor.engine.call(Pause("keep"))
        await until(lambda: supervisor.engine.stats.is_paused)
        os.kill(supervisor.engine.pid, 9)
        await until(lambda: supervisor.is_up and len(engines) == 2)
        assert await supervisor.engine.call(TellStepCosts())
        assert not supervisor.engine.stats.is_paused


async def test_an_engine_that_hangs_is_replaced() -> None:
    async with supervised(lambda before: start("hangs", before), limit=9, hang_s=0.5) as (supervisor, _, engines):
        stream = supervisor.engine.submit(ask(supervisor.engine))
        call = asyncio.create_task(supervisor.engine.call(TellStepCosts()))
        async with asyncio.timeout(SECONDS):
            with pytest.raises(EngineDiedError, match="SIGKILL"):
                await call
            assert (await stream.next())[-1].finish_reason == "error"
        await until(lambda: supervisor.is_up and len(engines) >= 2)


async def test_an_engine_that_cannot_come_up_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.engine.supervisor.FIRST_PAUSE_S", 0.01)

    async def begin(before: EngineClient | None) -> EngineClient:
        return await start("nothing" if before is None else "refuses", before)

    async with supervised(begin, limit=99) as (supervisor, running, engines):
        os.kill(supervisor.engine.pid, 9)
        with pytest.raises(EngineLostError, match="could not be started: the model is gone; giving up"):
            async with asyncio.timeout(SECONDS):
                await running
        assert supervisor.restarts == MAX_FAILED_STARTS and len(engines) == 1


async def test_a_start_that_is_given_up_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.engine.client.CLOSE_SECONDS", 2 * SECONDS)  # what a ready one would get
    starting = asyncio.create_task(start("loads for ever"))
    me = psutil.Process()

    def loading() -> list[psutil.Process]:
        found = []
        for process in me.children():
            with suppress(psutil.Error):
                found += [process] if "loads for ever" in process.cmdline() else []
        return found

    await until(lambda: bool(loading()))
    [process] = loading()
    starting.cancel()
    done, _ = await asyncio.wait({starting}, timeout=SECONDS)
    assert done and not process.is_running()


@pytest.mark.parametrize(("how", "error"), [("refuses", ModelError), ("dies early", EngineDiedError)])
async def test_the_first_start_says_why_it_failed(how: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="the model is gone" if how == "refuses" else "exit code 7"):
        await start(how)
