"""POST /inference/v1/generate: token ids in, token ids out, as vLLM's server answers it."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest

PROMPT = [504, 2365, 6354, 16438]
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


def generate(server: Any, prompt: list[int] = PROMPT, *, status: int = 200, **fields: Any) -> Any:
    body = {"token_ids": prompt, "sampling_params": GREEDY, **fields}
    found, reply = server.post("/inference/v1/generate", body)
    assert found == status, reply
    return reply


def test_it_says_the_same_as_a_completion(server: Any) -> None:
    reply = generate(server, sampling_params=GREEDY | {"logprobs": 2}, request_id="mine", return_token_ids=True)
    said = server.complete(PROMPT, max_tokens=6, ignore_eos=True, return_token_ids=True, logprobs=2)
    [choice] = reply["choices"]
    assert choice["token_ids"] == said["choices"][0]["token_ids"]
    assert (choice["finish_reason"], choice["stop_reason"], choice["index"]) == ("length", None, 0)
    assert reply["request_id"] == "mine" and reply["prompt_token_ids"] == PROMPT
    assert reply["usage"]["completion_tokens"] == 6 and reply["output_mode"] == "tokens"
    positions = choice["logprobs"]["content"]
    assert [position["token_id"] for position in positions] == choice["token_ids"]
    assert [position["logprob"] for position in positions] == said["choices"][0]["logprobs"]["token_logprobs"]
    for position in positions:
        assert position["rank"] == 1 and position["token"] == f"token_id:{position['token_id']}"
        assert [candidate["rank"] for candidate in position["top_logprobs"]] == [1, 2]
        assert position["top_logprobs"][0]["token_id"] == position["token_id"]


def test_without_a_limit_the_answer_may_fill_the_context(small_server: Any) -> None:
    reply = generate(small_server, PROMPT * 500, sampling_params={"temperature": 0, "ignore_eos": True})
    assert len(reply["choices"][0]["token_ids"]) == 2048 - 2000


def test_an_answer_may_have_no_tokens(server: Any) -> None:
    wanted = {"max_tokens": 0, "prompt_logprobs": 0}
    reply = generate(server, sampling_params=wanted)
    assert reply["choices"][0]["token_ids"] == reply["choices"][0]["weight_versions"] == []
    assert len(reply["prompt_logprobs"]) == len(PROMPT)


def test_a_limit_beyond_the_context_is_cut(small_server: Any) -> None:
    wanted = {"temperature": 0, "ignore_eos": True, "max_tokens": 1000}
    reply = generate(small_server, PROMPT * 500, sampling_params=wanted)
    assert reply["choices"][0]["finish_reason"] == "length"
    assert len(reply["choices"][0]["token_ids"]) == 48


def test_parameters_that_are_left_out_are_those_that_trainers_compute_with(start_local: Any) -> None:
    """The model's own recommendations would make log-probabilities of another distribution than that asked for."""
    server = start_local(generation_config="auto")
    wanted = {"max_tokens": 4, "seed": 3, "logprobs": 0, "logprobs_mode": "processed"}
    implicit = generate(server, sampling_params=wanted)
    explicit = generate(server, sampling_params=wanted | {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0})
    assert implicit["choices"] == explicit["choices"]


def test_samples_of_a_prompt_come_in_order_and_are_reproducible(server: Any) -> None:
    wanted = {"n": 3, "seed": 5, "max_tokens": 4, "temperature": 1.0, "logprobs": 0}
    first, second = (generate(server, sampling_params=wanted) for _ in range(2))
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert first["choices"] == second["choices"]
    assert all(len(choice["logprobs"]["content"]) == len(choice["token_ids"]) for choice in first["choices"])


def test_prompt_logprobs(server: Any) -> None:
    reply = generate(server, sampling_params=GREEDY | {"max_tokens": 1, "prompt_logprobs": 1})
    said = server.complete(PROMPT, max_tokens=1, prompt_logprobs=1)
    assert reply["prompt_logprobs"] == said["choices"][0]["prompt_logprobs"]
    assert reply["prompt_logprobs"][0] is None and str(PROMPT[1]) in reply["prompt_logprobs"][1]


def test_text_mode_adds_the_text(server: Any) -> None:
    reply = generate(server, output_mode="text", sampling_params=GREEDY | {"logprobs": 1})
    said = server.complete(PROMPT, max_tokens=6, ignore_eos=True)
    [choice] = reply["choices"]
    assert choice["text"] == said["choices"][0]["text"] and reply["output_mode"] == "text"
    assert all(set(entry) == {"token", "logprob", "bytes", "top_logprobs"} for entry in choice["logprobs"]["content"])


@pytest.mark.parametrize(("n", "interval"), [(1, None), (2, None), (2, 3)])
def test_a_stream_adds_up_to_the_answer(server: Any, n: int, interval: int | None) -> None:
    wanted = GREEDY | {"n": n, "logprobs": 1, "stream_interval": interval}
    whole = generate(server, sampling_params=wanted)
    body = {"token_ids": PROMPT, "sampling_params": wanted, "return_token_ids": True}
    events = server.events("/inference/v1/generate", body | {"stream_options": {"include_usage": True}})
    assert events.pop() == "[DONE]"
    last = events.pop()
    assert last["usage"] == whole["usage"] and last["choices"] == []
    assert [event["prompt_token_ids"] for event in events if "prompt_token_ids" in event] == [PROMPT]
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert [token for part in mine for token in part["token_ids"]] == choice["token_ids"]
        assert [entry for part in mine for entry in part["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert [part["finish_reason"] for part in mine][-1] == "length"
        assert all(len(part["token_ids"]) >= (interval or 1) for part in mine[1:-1])


def test_an_aborted_answer_has_its_tokens(start_local: Any) -> None:
    """Exactly those that it would have begun with, and their log-probabilities."""
    server = start_local()
    wanted = {"temperature": 1, "seed": 1, "max_tokens": 400, "ignore_eos": True, "logprobs": 0}
    whole = generate(server, sampling_params=wanted)["choices"][0]
    body = {"token_ids": PROMPT, "sampling_params": wanted | {"max_tokens": 20_000}, "request_id": "long"}
    with server.send("/inference/v1/generate", body) as connection:
        server.wait_until(lambda: server.metric("generation_tokens_total") > 420)
        assert server.post("/abort_requests", {"request_ids": ["other"]})[1] == {"status": "aborted", "aborted": 0}
        assert server.post("/abort_requests", {"request_ids": ["long"]})[1] == {"status": "aborted", "aborted": 1}
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        [choice] = json.loads(answer.read())["choices"]
    assert choice["finish_reason"] == "abort"
    count = min(len(choice["token_ids"]), 400)
    assert count > 10
    assert choice["token_ids"][:count] == whole["token_ids"][:count]
    assert choice["logprobs"]["content"][:count] == whole["logprobs"]["content"][:count]
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [10**6]}, "token_ids"),
        ({"token_ids": "text"}, "token_ids"),
        ({"sampling_params": None}, "sampling_params"),
        ({"sampling_params": {"max_tokens": -1}}, "sampling_params.max_tokens"),
        ({"sampling_params": {"logprobs": 1000}}, "sampling_params.logprobs"),
        ({"sampling_params": {"prompt_logprob_token_ids": [[1]]}}, "sampling_params.prompt_logprob_token_ids"),
        ({"features": {"mm_hashes": {}}}, "features"),
        ({"content_parts": [{"type": "image"}]}, "content_parts"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"output_mode": "speech"}, "output_mode"),
        ({"priority": -5}, "priority"),
    ],
)
def test_errors_name_the_field(server: Any, fields: Any, param: str) -> None:
    reply = generate(server, status=400, **fields)
    assert reply["error"]["param"] == param


def test_an_unknown_model_is_none(server: Any) -> None:
    assert generate(server, status=404, model="other")["error"]["code"] == "model_not_found"


def test_unknown_fields_are_ignored_as_vllm_ignores_them(server: Any) -> None:
    """Whatever --unknown-fields says: what trainers send changes from release to release."""
    sampling = GREEDY | {"output_kind": 2, "detokenize": False, "new_parameter": 1}
    reply = generate(server, sampling_params=sampling, data_parallel_rank=0, token_offsets=None)
    assert reply["choices"] == generate(server)["choices"]


def test_answers_follow_a_structure(server: Any) -> None:
    wanted = {"structured_outputs": {"choice": ["yes", "no"]}, "temperature": 1, "seed": 1, "max_tokens": 5}
    reply = generate(server, output_mode="text", sampling_params=wanted)
    assert reply["choices"][0]["text"] in ("yes", "no")


def test_a_rendered_conversation_can_be_sent_on(server: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    asked = {"messages": messages, "temperature": 0, "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 1}
    status, rendered = server.post("/v1/chat/completions/render", asked)
    assert status == 200, rendered
    said = server.chat("Hi", max_tokens=5, return_token_ids=True)
    assert rendered["token_ids"] == said["prompt_token_ids"]
    assert rendered["sampling_params"] == {"temperature": 0.0, "max_tokens": 5, "logprobs": 1}
    status, reply = server.post("/inference/v1/generate", rendered)
    assert status == 200, reply
    assert reply["choices"][0]["token_ids"] == said["choices"][0]["token_ids"]
    assert reply["request_id"] == rendered["request_id"]


def test_tools_are_told_to_the_model_if_nobody_is_to_look_for_calls(server: Any) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    template = {"chat_template_kwargs": None}
    plain = server.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]} | template)[1]["count"]
    asked = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool], "tool_choice": "none", "max_tokens": 1}
    status, rendered = server.post("/v1/chat/completions/render", asked)
    assert status == 200
    # The default model's template shows no tools, so what is told of them is nothing.
    assert len(rendered["token_ids"]) == plain


def test_images_are_refused(server: Any) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    status, reply = server.post("/v1/chat/completions/render", {"messages": [{"role": "user", "content": parts}]})
    assert status == 400 and reply["error"]["param"].startswith("messages.0.content.0")


def test_sessions_end_without_a_trace(server: Any) -> None:
    assert server.post("/finish_session?session_id=any", {}) == (200, {"status": "ok"})
