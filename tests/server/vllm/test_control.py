"""What vLLM's control routes do to a server that generates."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from slipstream.engine.operations import CheckIntegrity
from slipstream.server.sglang.refused import REFUSED as SGLANG_REFUSED
from slipstream.server.vllm.refused import REFUSED as VLLM_REFUSED
from tests.server.under_way import slow_steps

PROMPT = [504, 2365, 6354, 16438]


def post(server: Any, path: str, body: Any = None, *, status: int = 200) -> Any:
    found, reply = server.post(path, {} if body is None else body)
    assert found == status, reply
    return reply


class Asking:
    """A request that runs beside the test."""

    def __init__(self, server: Any, max_tokens: int = 8000, **fields: Any) -> None:
        wanted = {"temperature": 1, "seed": 1, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 0, **fields}
        self._body = {"token_ids": PROMPT, "sampling_params": wanted}
        self._server, self._reply = server, None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self._reply = self._server.post("/inference/v1/generate", self._body)

    def start(self) -> None:
        """Returns once it has more than twenty tokens, or all."""
        others = self._server.metric("num_requests_running")
        self._thread.start()
        self._server.wait_until(lambda: self.is_over or self._server.metric("num_requests_running") > others)
        # Not tokens, which others have as well: every step gives it one at least.
        steps = self._server.metric("engine_steps_total")
        self._server.wait_until(lambda: self.is_over or self._server.metric("engine_steps_total") > steps + 20)

    def __enter__(self) -> Asking:
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._thread.join(300)

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    @property
    def choice(self) -> Any:
        self._thread.join(300)
        assert self._reply is not None
        status, reply = self._reply
        assert status == 200, reply
        return reply["choices"][0]


def test_a_pause_that_aborts(trained: Any) -> None:
    with slow_steps(), Asking(trained) as long:
        assert post(trained, "/pause?mode=abort") == {"status": "paused"}
        assert long.choice["finish_reason"] == "abort"
        assert len(long.choice["token_ids"]) == len(long.choice["logprobs"]["content"]) > 20
    assert trained.get("/is_paused")[1] == {"is_paused": True}
    assert trained.get("/is_sleeping")[1] == {"is_sleeping": True}
    waiting = threading.Thread(target=trained.complete, args=(PROMPT,), kwargs={"max_tokens": 2})
    waiting.start()
    trained.wait_until(lambda: trained.metric("num_requests_waiting") == 1)
    assert post(trained, "/resume") == {"status": "resumed"}
    waiting.join(300)
    assert not waiting.is_alive()


def test_a_pause_that_keeps_changes_no_token(trained: Any) -> None:
    whole = Asking(trained, 800)
    with whole:
        pass
    again = Asking(trained, 800)
    with slow_steps():
        again.start()
        post(trained, "/pause?mode=keep&clear_cache=true")
    before = trained.metric("generation_tokens_total")
    assert not again.is_over
    assert post(trained, "/reset_prefix_cache") == {"success": False}, "a request holds some of it"
    assert trained.metric("generation_tokens_total") == before
    post(trained, "/resume")
    assert again.choice == whole.choice


@pytest.mark.parametrize("query", ["mode=wait", "wait_for_inflight_requests=true&clear_cache=false"])
def test_a_pause_that_waits_is_answered_when_all_have_ended(trained: Any, query: str) -> None:
    with Asking(trained, 600) as long:
        post(trained, f"/pause?{query}")
        assert long.choice["finish_reason"] == "length" and len(long.choice["token_ids"]) == 600
    post(trained, "/resume")


@pytest.mark.parametrize("path", ["/pause?mode=stop", "/pause?clear_cache=maybe", "/sleep?level=3", "/sleep?mode=now"])
def test_what_a_query_cannot_say(trained: Any, path: str) -> None:
    name = path.partition("?")[2].partition("=")[0]
    assert post(trained, path, status=400)["error"]["param"] == name


def test_requests_end_by_name_or_all_together(trained: Any) -> None:
    with slow_steps(), Asking(trained) as one, Asking(trained) as other:
        assert post(trained, "/abort_requests", {"request_ids": []}) == {"status": "aborted", "aborted": 2}
        assert one.choice["finish_reason"] == other.choice["finish_reason"] == "abort"
    assert post(trained, "/inference/v1/abort_requests", {"request_ids": ["nobody"]})["aborted"] == 0
    assert post(trained, "/inference/v1/abort_requests", {}, status=400)["error"]["param"] == "request_ids"


def test_the_prefix_cache_is_forgotten_also_under_running_requests(trained: Any) -> None:
    prompt = list(range(1000, 1200))
    trained.complete(prompt, max_tokens=1)
    cached = {"max_tokens": 1}
    assert trained.complete(prompt, **cached)["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    assert post(trained, "/reset_prefix_cache?reset_external=true") == {"success": True}
    assert trained.complete(prompt, **cached)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    whole = Asking(trained, 800)
    with whole:
        pass
    again = Asking(trained, 800)
    with slow_steps():
        again.start()
        assert post(trained, "/reset_prefix_cache", {"reset_running_requests": True}) == {"success": True}
        assert not again.is_over
    assert again.choice == whole.choice, "computed again from its tokens"


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_memory_back_until_it_wakes_up(trained: Any, level: int) -> None:
    before = trained.complete(PROMPT, max_tokens=8, temperature=0)["choices"]
    assert post(trained, f"/sleep?level={level}") == {"status": "sleeping", "level": level}
    assert trained.get("/is_sleeping")[1] == {"is_sleeping": True}
    assert post(trained, "/wake_up?tags=weights") == {"status": "sleeping", "tags": ["weights"]}
    assert trained.get("/is_sleeping")[1] == {"is_sleeping": True}
    assert post(trained, "/wake_up?tags=kv_cache") == {"status": "awake", "tags": ["kv_cache"]}
    assert trained.complete(PROMPT, max_tokens=8, temperature=0)["choices"] == before
    trained.operate(CheckIntegrity())


def test_sleep_without_giving_memory_back_is_a_pause(trained: Any) -> None:
    post(trained, "/sleep?level=0&mode=keep")
    assert trained.get("/is_paused")[1] == {"is_paused": True}
    assert post(trained, "/wake_up?tags=scheduling") == {"status": "awake", "tags": ["scheduling"]}
    assert post(trained, "/wake_up?tags=dreams", status=400)["error"]["param"] == "tags"


def test_the_cache_alone_is_released_in_a_pause(trained: Any) -> None:
    post(trained, "/pause?mode=keep")
    assert post(trained, "/release_kv_cache_memory") == {"status": "kv_cache_released"}
    assert post(trained, "/wake_up")["status"] == "awake"
    assert trained.complete(PROMPT, max_tokens=2)["choices"]


def test_versions_have_names(trained: Any) -> None:
    before = trained.get("/weight_info")[1]["weight_version"]
    for body in ({"new_version": "step-7"}, {"new_version": "step-8", "abort_all_requests": True}):
        reply = post(trained, "/update_weight_version", body)
        assert reply["success"] is True and reply["new_version"] == body["new_version"]
        assert trained.get("/weight_info")[1] == {"weight_version": body["new_version"]}
    post(trained, "/update_weight_version", {"new_version": before})


def test_an_sglang_client_can_end_requests_with_the_version(trained: Any) -> None:
    with slow_steps(), Asking(trained) as kept:
        post(trained, "/update_weight_version", {"new_version": "default"})
        assert not kept.is_over
        post(trained, "/update_weight_version", {"new_version": "default", "abort_all_requests": True})
        assert kept.choice["finish_reason"] == "abort"


def test_checksums_tell_what_serves(trained: Any, policy: Any, other_model: Path) -> None:
    found = post(trained, "/weight_checker", {"action": "checksum"})["checksums"]
    assert set(found) == set(policy(0))
    assert post(trained, "/weight_checker", {"action": "compare", "baseline": found}) == {
        "match": True,
        "mismatches": [],
    }
    other = dict.fromkeys(found, "0") | {"new.weight": "1"}
    reply = post(trained, "/weight_checker", {"action": "compare", "baseline": other})
    assert reply == {"match": False, "mismatches": sorted(other)}
    for body in ({"action": "compare"}, {"action": "reset"}, {"action": "burn"}):
        post(trained, "/weight_checker", body, status=400)


def test_one_process_takes_weights(trained: Any) -> None:
    for path in ("/get_world_size", "/get_world_size?include_dp=false", "/get_world_size/"):
        assert trained.get(path) == (200, {"world_size": 1})


def test_drafters_are_not_sent(trained: Any) -> None:
    assert "drafters/import" in json.dumps(post(trained, "/start_draft_weight_update", status=400))


@pytest.mark.parametrize("path", [*VLLM_REFUSED, *SGLANG_REFUSED])
def test_what_is_not_here_is_refused_with_what_to_use_instead(trained: Any, path: str) -> None:
    error = post(trained, path, {"zmq_handles": {}}, status=400)["error"]
    assert error["code"] == "unsupported_route" and error["message"].startswith(path)
    routes = trained.get("/openapi.json")[1]["paths"]
    instead = [word.rstrip(",;.)(").lstrip("(") for word in error["message"].removeprefix(path).split() if "/" in word]
    assert instead and set(instead) <= routes.keys() - VLLM_REFUSED.keys() - SGLANG_REFUSED.keys()


def test_prime_rl_asks_whether_the_engine_is_there(trained: Any) -> None:
    assert trained.get("/liveness") == (200, {"status": "ok"})
