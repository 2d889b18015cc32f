import asyncio
import json
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.usefixtures("sharegpt")


async def locust(server, enough, *arguments):
    """Run three users until the server had so many requests; the exit status and the statistics by name."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "locust", "-f", find_spec("slipstream.loadtest.locustfile").origin),
        *("--host", server.url, "--headless", "-u", "3", "-r", "3", "-t", "300s", "-s", "60", "--json", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    done = asyncio.create_task(process.communicate())
    while len(server.bodies) < enough and not done.done():
        await asyncio.sleep(0.01)
    process.terminate()
    out, err = await asyncio.wait_for(done, 300)
    assert b"Traceback" not in err, err.decode()
    out = out.replace(b"[]", b"")  # of worker processes, whose line breaks may come later
    return process.returncode, {row["name"]: row for row in json.loads(out)}


def mean(row):
    return row["total_response_time"] / row["num_requests"]


async def test_users_stream_answers_and_report_token_latencies(serve):
    async with serve(ttft=0.05, pace=0.02) as server:
        status, rows = await locust(server, 12, "--output-tokens", "6", "--model", "scripted")
    assert status == 0
    posts, first, gaps = (rows[name] for name in ("/v1/chat/completions", "time to first token", "inter-token latency"))
    assert posts["num_requests"] == first["num_requests"] >= 12
    assert posts["num_failures"] == 0
    assert gaps["num_requests"] == 5 * first["num_requests"]
    # Sleeps of the server are never shorter than asked for; the machine may make them longer. What comes late for one
    # token is missing before the next.
    assert mean(first) >= 50 and mean(gaps) > 0
    assert 50 + 5 * 20 <= mean(first) + 5 * mean(gaps) <= mean(posts) + 1
    assert {body["max_tokens"] for body in server.bodies} == {6}
    assert len({body["messages"][0]["content"] for body in server.bodies}) == len(server.bodies)


async def test_worker_processes_draw_different_prompts(serve):
    async with serve(pace=0.1) as server:
        status, rows = await locust(server, 12, "--processes", "2", "--output-tokens", "3")
    assert status == 0
    assert rows["/v1/chat/completions"]["num_failures"] == 0
    prompts = [body["messages"][0]["content"] for body in server.bodies]
    assert len(prompts) == len(set(prompts)) >= 6


async def test_broken_streams_are_failures(serve):
    faults = ("error", "mid-error", "break", "no-finish")
    async with serve() as server:
        server.on_request = lambda: setattr(server, "fault", faults[len(server.bodies) % 4])
        status, rows = await locust(server, 12, "--output-tokens", "3")
    assert status == 1
    posts = rows["/v1/chat/completions"]
    assert posts["num_failures"] == posts["num_requests"] >= 8
    assert len(server.bodies) - posts["num_requests"] <= 3  # under way when the time was over
