"""Pauses and sleep of a server, and who asks it meanwhile."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import pytest

from slipstream.engine.operations import PauseMode
from slipstream.server.errors import ApiError
from slipstream.server.rollout.control import Control
from tests.server.under_way import SHORT, generated, slow_steps, wait_for_tokens


def test_a_pause_that_waits_has_settled_when_it_returns(server: Any, control: Control) -> None:
    before = generated(server)
    with ThreadPoolExecutor(2) as pool:
        with slow_steps():
            asked = pool.submit(server.complete, **SHORT)
            wait_for_tokens(server, before, 5)
            pausing = pool.submit(server.run, control.pause("wait", settle=True))
            server.wait_until(lambda: control.paused)
            assert not asked.done() and not pausing.done()
        pausing.result(300)
        assert server.service.engine.stats.num_running == 0 and control.paused
        assert asked.result(300)["usage"]["completion_tokens"] == 300
    assert server.run(control.flush_prefix_cache())
    server.run(control.resume())
    assert not control.paused


def test_a_flush_tells_whether_something_is_still_held(server: Any, control: Control) -> None:
    before = generated(server)
    with ThreadPoolExecutor(1) as pool:
        with slow_steps():
            asked = pool.submit(server.complete, **SHORT)
            wait_for_tokens(server, before, 5)
            server.run(control.pause("keep"))
        assert not server.run(control.flush_prefix_cache())
        server.run(control.pause("abort"))
        assert asked.result(300)["choices"][0]["finish_reason"] == "abort"
        assert server.run(control.flush_prefix_cache())
        server.run(control.resume())


@pytest.mark.parametrize("mode", get_args(PauseMode))
def test_who_asks_a_server_that_sleeps(server: Any, control: Control, mode: PauseMode) -> None:
    expected = server.complete("The quick brown fox", max_tokens=8)["choices"]
    server.run(control.release_memory(mode=mode, keep_weights=False))
    assert control.released == {"kv_cache", "weights"}
    assert server.get("/health") == (
        200,
        {"status": "asleep", "reason": "it has given back the memory of kv_cache and weights"},
    )
    if mode == "abort":
        status, reply = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
        assert status == 503 and reply["error"]["code"] == "asleep"
        assert "memory of kv_cache and weights; wake it up" in reply["error"]["message"]
        assert server.get("/ready")[0] == 503
        server.run(control.resume_memory())
        assert server.complete("The quick brown fox", max_tokens=8)["choices"] == expected
        return
    assert server.get("/ready")[0] == 200
    done = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.complete, "The quick brown fox", max_tokens=8)
        asked.add_done_callback(lambda _: done.set())
        server.wait_until(lambda: control.open_requests)
        server.run(control.resume_memory(["weights"]))
        assert not done.wait(0.3) and control.released == {"kv_cache"}
        server.run(control.resume_memory(["kv_cache"]))
        assert asked.result(300)["choices"] == expected


def test_memory_of_no_kind_is_refused(server: Any, control: Control) -> None:
    with pytest.raises(ApiError, match="kv_cache, weights, not 'graphs'"):
        server.run(control.release_memory(["graphs"]))  # type: ignore[list-item]
