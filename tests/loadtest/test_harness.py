import math

import pytest

from slipstream.clients.errors import UnreachableError
from slipstream.loadtest.arrivals import ClosedLoop, OpenLoop
from slipstream.loadtest.harness import connect, measure, receive
from slipstream.loadtest.record import RequestRecord
from slipstream.loadtest.report import summarise
from slipstream.loadtest.workloads import CHAT, COMPLETIONS, Request


@pytest.fixture
def serve(serve, time_that_leaps):
    return serve


def chats(count: int, tokens: int = 10) -> list[Request]:
    return [
        Request(CHAT, {"messages": [{"role": "user", "content": f"Hello {number}"}], "max_tokens": tokens})
        for number in range(count)
    ]


async def test_measured_times_are_those_of_the_server(serve):
    async with serve(ttft=0.06, pace=0.02) as server, connect(server.url) as target:
        run = await measure(target, chats(6), ClosedLoop(3))
    figures = summarise(run)
    assert (figures["completed"], figures["failed"]) == (6, 0)
    assert figures["total_output_tokens"] == 60
    assert figures["total_input_tokens"] == 12
    assert figures["max_concurrent_requests"] == 3
    # Sleeps of the server are never shorter than asked for; the machine may make them longer.
    assert figures["mean_ttft_ms"] >= 60
    assert figures["mean_itl_ms"] >= 20
    assert figures["mean_tpot_ms"] == pytest.approx(figures["mean_itl_ms"])
    assert figures["mean_e2el_ms"] >= figures["mean_ttft_ms"] + 9 * figures["mean_itl_ms"] - 0.01
    # Six requests, three at a time at most and one at least.
    assert 2 * figures["mean_e2el_ms"] <= figures["duration"] * 1e3 + 0.01
    assert figures["duration"] * 1e3 < 6 * figures["mean_e2el_ms"]
    assert figures["output_throughput"] == pytest.approx(60 / figures["duration"], rel=1e-3)


async def test_chunks_of_several_tokens_are_told_apart_from_slow_tokens(serve):
    async with serve(pace=0.03, tokens_per_chunk=4) as server, connect(server.url) as target:
        assert target.chunk_usage
        figures = summarise(await measure(target, chats(2, tokens=16), ClosedLoop(2)))
    assert figures["mean_tokens_per_chunk"] == 4
    assert figures["token_itl_known"] == 2
    assert figures["mean_itl_ms"] >= 30
    assert figures["mean_token_itl_ms"] == pytest.approx(figures["mean_itl_ms"] / 4, rel=1e-3)


async def test_a_server_that_counts_only_at_the_end_is_asked_no_more(serve):
    async with serve(chunk_usage=False, tokens_per_chunk=4) as server, connect(server.url) as target:
        assert not target.chunk_usage
        figures = summarise(await measure(target, chats(2, tokens=16), ClosedLoop(2)))
        assert server.bodies[-1]["stream_options"] == {"include_usage": True}
    assert figures["total_output_tokens"] == 32
    assert (figures["token_itl_known"], figures["mean_token_itl_ms"]) == (0, None)


async def test_a_server_without_usage_has_its_chunks_counted(serve):
    async with serve(usage=False, chunk_usage=False) as server, connect(server.url) as target:
        figures = summarise(await measure(target, chats(2), ClosedLoop(2)))
    assert (figures["token_counts"], figures["total_output_tokens"]) == ("chunks", 20)
    assert figures["total_token_throughput"] is None


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error", "scripted refusal"),
        ("mid-error", "scripted failure"),
        ("break", "connection lost"),
        ("no-finish", "0 finish reasons"),
        ("two-finishes", "2 finish reasons"),
    ],
)
async def test_a_failure_is_recorded_and_the_other_requests_go_on(serve, fault, message):
    ended = []
    async with serve() as server, connect(server.url) as target:
        server.fault = fault
        run = await measure(target, chats(4), ClosedLoop(1), ended.append)
    assert [record.ok for record in run.records] == [False, True, True, True] == ended
    assert message in run.records[0].error
    figures = summarise(run)
    assert (figures["completed"], figures["failed"], figures["total_output_tokens"]) == (3, 1, 30)
    assert len(figures["errors"]) == 1


async def test_open_loop_has_all_requests_under_way_at_once(serve):
    async with serve() as server, connect(server.url) as target:
        server.together = 20
        figures = summarise(await measure(target, chats(20, tokens=2), OpenLoop(math.inf)))
        assert server.most_running == figures["max_concurrent_requests"] == 20


async def test_receive_disconnects_after_so_many_chunks(serve):
    async with serve(pace=0.01) as server, connect(server.url) as target:
        record = RequestRecord(due=0.0, start=0.0)
        assert await receive(target, chats(1, tokens=1000)[0], record, max_chunks=3)
        assert len(record.chunk_times) == 3
        assert record.error is None
        assert not await receive(target, chats(1)[0], RequestRecord(due=0.0, start=0.0))
    assert server.disconnects == 1
    assert server.running == 0


async def test_bodies_carry_model_stream_options_and_extra_fields(serve):
    async with serve() as server, connect(server.url, extra={"top_p": 0.5, "temperature": 1}) as target:
        await measure(target, [Request(COMPLETIONS, {"prompt": "x", "max_tokens": 2, "temperature": 0})], ClosedLoop(1))
    assert server.bodies[-1] == {
        "model": "scripted",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "prompt": "x",
        "max_tokens": 2,
        "temperature": 1,
        "top_p": 0.5,
    }


async def test_the_tokenizer_is_used_where_there_is_one(serve):
    async with serve() as server, connect(server.url) as target:
        assert target.tokenizer is not None
    async with serve(tokenizer=False) as server, connect(server.url, model="other") as target:
        assert target.tokenizer is None
        assert target.model == "other"


async def test_requests_time_out(serve):
    async with serve(pace=0.01) as server, connect(server.url, timeout=0.2) as target:
        run = await measure(target, chats(1, tokens=1000), ClosedLoop(1))
    assert not run.records[0].ok


async def test_no_server_is_an_error():
    with pytest.raises(UnreachableError):
        async with connect("http://127.0.0.1:9"):
            pass
