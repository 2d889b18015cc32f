"""Pauses, aborts and questions, as trainers and routers send them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.server.under_way import slow_steps

PROMPT = [504, 2632, 6354, 16438, 28]
LONG = {"max_new_tokens": 8000, "temperature": 1, "sampling_seed": 9, "ignore_eos": True}


@pytest.fixture(scope="module")
def paused(start_local: Callable[..., Any]) -> Any:
    """A server that tests may pause."""
    return start_local(max_running=4)


class Running:
    """A request that is under way in a thread of its own."""

    def __init__(self, server: Any, **body: Any) -> None:
        self._server = server
        self._body = {"input_ids": PROMPT, "sampling_params": LONG, "return_logprob": True, **body}
        self._answer: Any = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._answer = self._server.post("/generate", self._body)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def answer(self) -> Any:
        self._thread.join(300)
        status, answer = self._answer
        assert status == 200, answer
        return answer


def load(server: Any) -> dict[str, Any]:
    status, answer = server.get("/v1/loads?include=core")
    assert status == 200
    [found] = answer["loads"]
    assert "queues" not in found
    return dict(found)


def wait_for(server: Any, running: int, waiting: int = 0) -> None:
    def begun() -> bool:
        found = load(server)
        return (found["num_running_reqs"], found["num_waiting_reqs"]) == (running, waiting)

    server.wait_until(begun)


def generated(server: Any) -> float:
    return float(server.metric("generation_tokens_total"))


def wait_for_tokens(server: Any, count: int = 20) -> None:
    before = generated(server)
    server.wait_until(lambda: generated(server) >= before + count)


def post(server: Any, path: str, **body: Any) -> Any:
    status, answer = server.post(path, body)
    assert status == 200, answer
    return answer


def flush(server: Any, method: str = "GET", query: str = "") -> int:
    status, _, _ = server.request(method, f"/flush_cache{query}")
    return int(status)


@pytest.fixture
def idle(paused: Any) -> Iterator[Any]:
    yield paused
    post(paused, "/continue_generation")
    post(paused, "/abort_request", abort_all=True)
    paused.wait_until_idle()


def check_partial(server: Any, answer: Any) -> None:
    """What was cut off is the beginning of the whole answer: tokens, log-probabilities and text, to the last one."""
    meta = answer["meta_info"]
    assert meta["finish_reason"]["type"] == "abort" and meta["finish_reason"]["message"]
    count = meta["completion_tokens"]
    assert 0 < count < LONG["max_new_tokens"]
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    whole = post(
        server, "/generate", input_ids=PROMPT, return_logprob=True, sampling_params=LONG | {"max_new_tokens": count}
    )
    assert answer["output_ids"] == whole["output_ids"]
    assert meta["output_token_logprobs"] == whole["meta_info"]["output_token_logprobs"]
    assert answer["text"] == whole["text"]


def test_an_aborted_request_answers_with_exactly_what_it_has_said(idle: Any) -> None:
    with slow_steps():
        one, other = Running(idle, rid="one"), Running(idle, rid="other")
        wait_for(idle, 2)
        wait_for_tokens(idle)
        assert post(idle, "/abort_request", rid="o") == {"aborted": 0}, "no request is called so"
        assert post(idle, "/abort_request", rid="") == post(idle, "/abort_request", rid="gone") == {"aborted": 0}
        assert post(idle, "/abort_request", rid="one") == {"aborted": 1}
        answer = one.answer()
        assert answer["meta_info"]["id"] == "one" and other.is_alive
        assert post(idle, "/abort_request", abort_all=True) == {"aborted": 1}
    check_partial(idle, other.answer())
    check_partial(idle, answer)


def test_a_batch_is_aborted_by_its_id_and_one_of_it_by_its_own(idle: Any) -> None:
    with slow_steps():
        batch = Running(idle, rid="b", sampling_params=LONG | {"n": 3})
        wait_for(idle, 3)
        wait_for_tokens(idle)
        assert post(idle, "/abort_request", rid="b_1") == {"aborted": 1}
        wait_for(idle, 2)
        wait_for_tokens(idle)
        assert batch.is_alive and post(idle, "/abort_request", rid="b")["aborted"] >= 2
    answers = batch.answer()
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers] == ["abort"] * 3
    counts = [answer["meta_info"]["completion_tokens"] for answer in answers]
    assert counts[1] < counts[0]


def test_aborted_streams_and_those_of_the_other_dialect(idle: Any) -> None:
    streamed: list[Any] = []
    body = {"input_ids": PROMPT, "sampling_params": LONG, "rid": "s", "return_logprob": True}
    stream = threading.Thread(target=lambda: streamed.extend(idle.events("/generate", body)))
    other: list[Any] = []
    completion = {"prompt": PROMPT, "max_tokens": 8000, "ignore_eos": True, "temperature": 1, "seed": 9}
    whole = threading.Thread(target=lambda: other.append(idle.post("/v1/completions", completion)))
    with slow_steps():
        for thread in (stream, whole):
            thread.start()
        wait_for(idle, 2)
        wait_for_tokens(idle)
        post(idle, "/abort_request", abort_all=True)
    stream.join(300)
    whole.join(300)
    assert streamed[-1] == "[DONE]"
    check_partial(idle, streamed[-2])
    status, answer = other[0]
    assert status == 200 and answer["choices"][0]["finish_reason"] == "abort"


def test_waiting_requests_are_aborted_too(idle: Any) -> None:
    with slow_steps():
        requests = [Running(idle, rid=f"w{i}") for i in range(6)]
        wait_for(idle, 4, 2)
        assert post(idle, "/abort_request", abort_all=True) == {"aborted": 6}
    answers = [request.answer() for request in requests]
    counts = [answer["meta_info"]["completion_tokens"] for answer in answers]
    for answer, count in zip(answers, counts, strict=True):
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        version = answer["meta_info"]["weight_version"]
        assert answer["meta_info"]["weight_versions"] == [{"version": version, "start": 0, "end": count}]
        assert len(answer["output_ids"]) == len(answer["meta_info"]["output_token_logprobs"]) == count
    assert counts.count(0) >= 2


@pytest.mark.parametrize("body", [{}, {"mode": "abort"}, None])
def test_a_pause_that_aborts(idle: Any, body: Any) -> None:
    data = None if body is None else json.dumps(body).encode()
    with slow_steps():
        before = Running(idle)
        wait_for(idle, 1)
        wait_for_tokens(idle)
        status, _, reply = idle.request("POST", "/pause_generation", data, {"content-type": "application/json"})
    assert status == 200 and json.loads(reply)["status"] == "ok"
    check = before.answer()
    assert flush(idle) == flush(idle, "POST") == 200
    held = Running(idle, sampling_params={"max_new_tokens": 3, "temperature": 0})
    wait_for(idle, 0, 1)
    assert held.is_alive and flush(idle) == 200, "what waits holds nothing"
    assert idle.get("/health_generate")[1] == {"status": "paused"}
    assert post(idle, "/continue_generation", torch_empty_cache=True)["status"] == "ok"
    assert held.answer()["meta_info"]["completion_tokens"] == 3
    check_partial(idle, check)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_in_which_requests_stand_still(idle: Any, mode: str) -> None:
    sampling = LONG | {"max_new_tokens": 600}
    expected = post(idle, "/generate", input_ids=PROMPT, sampling_params=sampling)["output_ids"]
    with slow_steps():
        request = Running(idle, sampling_params=sampling, return_logprob=False)
        wait_for(idle, 1)
        wait_for_tokens(idle, 1)
        post(idle, "/pause_generation", mode=mode)
    count = generated(idle)
    assert request.is_alive
    assert flush(idle) == (200 if mode == "retract" else 400)
    if mode == "in_place":
        assert flush(idle, query="?timeout=0.2") == 400
    assert generated(idle) == count
    post(idle, "/continue_generation")
    answer = request.answer()
    assert answer["output_ids"] == expected and answer["meta_info"]["finish_reason"]["type"] == "length"


def test_the_cache_is_flushed_when_nothing_holds_it(idle: Any) -> None:
    body = {"input_ids": [410] * 64, "sampling_params": {"max_new_tokens": 1}}
    post(idle, "/generate", **body)
    assert post(idle, "/generate", **body)["meta_info"]["cached_tokens"] > 0
    assert flush(idle) == 200
    assert post(idle, "/generate", **body)["meta_info"]["cached_tokens"] == 0
    with slow_steps():
        request = Running(idle, rid="f")
        wait_for(idle, 1)
        wait_for_tokens(idle, 1)
        assert flush(idle) == 400
        threading.Timer(0.3, lambda: post(idle, "/abort_request", rid="f")).start()
        assert flush(idle, query="?timeout=100") == 200
    request.answer()
    for query in ("?timeout=x", "?timeout=-1", "?timeout=inf"):
        assert flush(idle, query=query) == 400


def test_what_routers_and_trainers_ask(idle: Any) -> None:
    for path in ("/server_info", "/get_server_info"):
        status, found = idle.get(path)
        assert status == 200
        for name in ("tp_size", "pp_size", "dp_size", "ep_size", "num_gpus", "nnodes"):
            assert found[name] == 1
        assert found["disaggregation_mode"] == "null" and found["enable_memory_saver"] is False
        assert found["max_running_requests"] == 4
        assert found["vllm_config"]["weight_transfer_config"] and found["vllm_config"]["model_config"]["logprobs_mode"]
    for path in ("/model_info", "/get_model_info"):
        status, found = idle.get(path)
        assert status == 200 and found["is_generation"] is True
        assert found["weight_version"] == idle.get("/get_weight_version")[1]["weight_version"]
        assert found["model_path"].endswith("tiny-model") and found["served_model_name"]
    assert idle.get("/health_generate") == (200, {"status": "ok"})
    assert idle.get("/get_load")[1] == [{"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}]
    everything = idle.get("/v1/loads")[1]["loads"][0]
    assert {"memory", "speculative", "queues"} <= set(everything)
    assert everything["max_total_num_tokens"] > 1000 and everything["token_usage"] == 0
    with slow_steps():
        request = Running(idle)
        wait_for(idle, 1)
        assert idle.get("/get_load")[1][0]["num_reqs"] == 1
        assert idle.get("/health_generate") == (200, {"status": "ok"}), "it is at work"
        post(idle, "/abort_request", abort_all=True)
    request.answer()
    wait_for(idle, 0)
    for query in ("?include=more", "?dp_rank=1", "?format=prometheus"):
        assert idle.get(f"/v1/loads{query}")[0] == 400


CONTROL = [
    *("/pause_generation", "/continue_generation", "/abort_request", "/flush_cache", "/release_memory_occupation"),
    *("/resume_memory_occupation", "/update_weights_from_disk", "/update_weights_from_tensor"),
    *("/init_weights_update_group", "/destroy_weights_update_group", "/update_weights_from_distributed"),
    *("/begin_weight_update", "/end_weight_update", "/get_weights_by_name", "/weights_checker"),
    *("/load_lora_adapter", "/load_lora_adapter_from_tensors", "/unload_lora_adapter"),
]


def test_the_admin_key_guards_what_controls(start_local: Callable[..., Any]) -> None:
    server = start_local(api_key=("user",), admin_key=("admin",))
    json_type = {"content-type": "application/json"}

    def ask(path: str, key: str, method: str = "POST") -> int:
        headers = json_type | ({"authorization": f"Bearer {key}"} if key else {})
        return int(server.request(method, path, b"{}", headers)[0])

    for path in CONTROL:
        assert (ask(path, ""), ask(path, "user"), ask(path + "%0A", "user")) == (401, 403, 404), path
        assert ask(path, "admin") in (200, 400), path
    assert ask("/flush_cache", "user", "GET") == 403 and ask("/flush_cache", "admin", "GET") == 200
    ask("/continue_generation", "admin")
    for path in ("/server_info", "/model_info", "/v1/loads", "/get_load", "/get_weight_version"):
        assert (ask(path, "", "GET"), ask(path, "admin", "GET"), ask(path, "user", "GET")) == (401, 403, 200)
    assert (ask("/generate", ""), ask("/generate", "admin"), ask("/generate", "user")) == (401, 403, 400)
    assert ask("/health_generate", "", "GET") == 200
