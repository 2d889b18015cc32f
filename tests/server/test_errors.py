"""Every refusal has the same body, the right status, and names the field."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from datetime import datetime
from typing import Any

import pytest

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
JSON = {"content-type": "application/json"}


def error_of(reply: Any) -> dict[str, Any]:
    assert set(reply) == {"error"}
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert reply["error"]["message"]
    error: dict[str, Any] = reply["error"]
    return error


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", 2.5, "temperature"),
        ("temperature", "0.5", "temperature"),
        ("temperature", True, "temperature"),
        ("top_p", 1.5, "top_p"),
        ("top_k", -2, "top_k"),
        ("min_p", -0.1, "min_p"),
        ("n", 0, "n"),
        ("n", 129, "n"),
        ("n", 10**30, "n"),
        ("max_tokens", -2, "max_tokens"),
        ("max_tokens", 1.5, "max_tokens"),
        ("min_tokens", 17, "min_tokens"),
        ("frequency_penalty", 3, "frequency_penalty"),
        ("presence_penalty", -3, "presence_penalty"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("logit_bias", {"5": 101}, "logit_bias.5"),
        ("logit_bias", {"five": 1}, "logit_bias.five"),
        ("logit_bias", {"999999": 1}, "logit_bias"),
        ("allowed_token_ids", [], "allowed_token_ids"),
        ("allowed_token_ids", [999999], "allowed_token_ids"),
        ("stop_token_ids", [999999], "stop_token_ids"),
        ("stop", [""], "stop.0"),
        ("stop", {"text": "x"}, "stop"),
        ("stop", ["x"] * 65, "stop"),
        ("stop", "x" * 513, "stop"),
        ("seed", 2**63, "seed"),
        ("prompt_logprobs", 21, "prompt_logprobs"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("stream", "yes", "stream"),
        ("priority", 10**9, "priority"),
        ("cache_salt", "", "cache_salt"),
        ("request_id", "a\nb", "request_id"),
        ("logprobs_mode", "cooked", "logprobs_mode"),
        ("user", 5, "user"),
        ("use_beam_search", True, "use_beam_search"),
        ("no_such_field", 1, "no_such_field"),
    ],
)
def test_both_endpoints_name_the_field(server: Any, field: str, value: Any, param: str) -> None:
    for path, body in ((CHAT, {"messages": MESSAGES, "max_tokens": 16}), (COMPLETE, {"prompt": "Hi"})):
        status, reply = server.post(path, {**body, field: value})
        assert status == 400, reply
        error = error_of(reply)
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("messages", [], "messages"),
        ("messages", "Hi", "messages"),
        ("messages", [{"role": "user"}], "messages.0.content"),
        ("messages", [{"role": "robot", "content": "x"}], "messages.0.role"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0.type"),
        ("messages", [{"role": "user", "content": {"type": "text", "text": "x"}}], "messages.0.content"),
        ("messages", [{"role": "assistant", "tool_calls": [{}]}], "messages.0.tool_calls.0.function"),
        ("tool_choice", "any", "tool_choice"),
        ("functions", [{}], "functions.0.name"),
        ("response_format", {"type": "xml"}, "response_format.type"),
        ("modalities", ["text", "audio"], "modalities"),
        ("audio", {}, "audio"),
        ("prediction", {}, "prediction.type"),
        ("reasoning_effort", "high", "reasoning_effort"),
        ("enable_thinking", True, "enable_thinking"),
        ("thinking", {"type": "enabled"}, "thinking"),
        ("repeat_penalty", 1.1, "repeat_penalty"),
        ("mirostat", 2, "mirostat"),
        ("dynatemp_range", 0.5, "dynatemp_range"),
        ("top_n_sigma", 1.5, "top_n_sigma"),
        ("verbosity", "low", "verbosity"),
        ("web_search_options", {}, "web_search_options"),
        ("top_logprobs", 2, "top_logprobs"),
        ("max_tokens", 0, "max_tokens"),
        ("max_completion_tokens", 0, "max_completion_tokens"),
        ("chat_template", "{{ messages }}", "chat_template"),
        ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs.messages"),
    ],
)
def test_chat_names_the_field(server: Any, field: str, value: Any, param: str) -> None:
    status, reply = server.post(CHAT, {"messages": MESSAGES, field: value})
    assert status == 400, reply
    assert error_of(reply)["param"] == param


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("prompt", [], "prompt"),
        ("prompt", [[]], "prompt.0"),
        ("prompt", ["a", 5], "prompt.1"),
        ("prompt", [[1], ["a"]], "prompt.1.0"),
        ("prompt", [1, -1], "prompt.1"),
        ("prompt", [999999], "prompt"),
        ("prompt", "", "prompt"),
        ("prompt", None, "prompt"),
        ("prompt", ["x"] * 1025, "prompt"),
        ("suffix", "end", "suffix"),
        ("speculation", {"mode": ""}, "speculation.mode"),
        ("best_of", 2, "best_of"),
        ("logprobs", 21, "logprobs"),
        ("logprobs", "1", "logprobs"),
        ("max_tokens", 0, "max_tokens"),
    ],
)
def test_completions_name_the_field(server: Any, field: str, value: Any, param: str) -> None:
    status, reply = server.post(COMPLETE, {"prompt": "Hi", field: value})
    assert status == 400, reply
    assert error_of(reply)["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "store": True, "service_tier": "auto", "metadata": {"a": "b"}, "prompt_cache_key": "k"},
        {"prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "explicit", "ttl": "30m"}},
        {
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": "none",
            "parallel_tool_calls": True,
        },
        {"response_format": {"type": "text"}, "modalities": ["text"], "reasoning_effort": "none"},
        {"enable_thinking": False, "think": False, "thinking": {"type": "disabled"}, "verbosity": "medium"},
        {"cache_prompt": True, "id_slot": -1, "repeat_penalty": 1.0, "typical_p": 1, "mirostat": 0, "top_a": 0},
        {"mirostat_tau": 5.0, "mirostat_eta": 0.1, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1},
        {"dry_sequence_breakers": ["\n", ":"], "xtc_threshold": 0.1, "repeat_last_n": 64, "dynatemp_exponent": 1.0},
        {"dynatemp_range": 0.0, "typ_p": 1.0, "top_n_sigma": -1.0, "min_keep": 0, "n_probs": 0, "lora": []},
        {"grammar": "", "json_schema": None, "regex": "", "ebnf": ""},
        {"echo": False, "best_of": 1, "documents": [], "mm_processor_kwargs": {}, "vllm_xargs": {}, "top_logprobs": 0},
        {"no_such_field": None, "functions": None, "temperature": None, "n": None, "stop": None, "seed": None},
        {"max_tokens": 1, "max_completion_tokens": 1, "stop": [], "stop_token_ids": [], "logit_bias": {}},
    ],
)
def test_fields_that_cannot_change_the_answer_are_accepted(server: Any, fields: dict[str, Any]) -> None:
    status, reply = server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1, **fields})
    assert status == 200, reply


def test_messages_come_back_as_clients_have_them(server: Any) -> None:
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    part["prompt_cache_breakpoint"] = {"mode": "explicit"}
    said = {"role": "assistant", "content": "Yes.", "reasoning": "It is.", "cache_control": {"type": "ephemeral"}}
    status, reply = server.post(CHAT, {"messages": [{"role": "user", "content": [part]}, said], "max_tokens": 1})
    assert status == 200, reply


def test_context_length(server: Any) -> None:
    limit = server.get("/v1/models")[1]["data"][0]["max_model_len"]
    status, reply = server.post(COMPLETE, {"prompt": "Hi there", "max_tokens": limit})
    error = error_of(reply)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert str(limit) in error["message"]
    status, reply = server.post(COMPLETE, {"prompt": [5] * (limit + 1)})
    assert error_of(reply)["code"] == "context_length_exceeded"
    status, reply = server.post(COMPLETE, {"prompt": "word " * 2_000_000})
    assert error_of(reply)["code"] == "context_length_exceeded"


def test_unknown_model(server: Any) -> None:
    for path, body in ((CHAT, {"messages": MESSAGES}), (COMPLETE, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        status, reply = server.post(path, body | {"model": "another"})
        error = error_of(reply)
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    status, reply = server.get("/v1/models/another")
    assert (status, error_of(reply)["code"]) == (404, "model_not_found")


def test_routes(server: Any) -> None:
    status, reply = server.get("/v1/no/such/route")
    assert (status, error_of(reply)["code"]) == (404, "unknown_route")
    status, reply = server.get(CHAT)
    assert (status, error_of(reply)["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", CHAT),
        ("/v1/v1/chat/completions", CHAT),
        ("//v1/chat/completions/", CHAT),
        ("/openai/deployments/x/chat/completions", CHAT),
        ("/v1/engines/x/completions", COMPLETE),
        ("/V1/Messages", "/v1/messages"),
        ("/models", "/v1/models"),
        ("/v1/images/generations", None),
    ],
)
def test_a_wrong_base_url_is_told_the_right_one(server: Any, path: str, meant: str | None) -> None:
    status, reply = server.post(path, {})
    assert (status, error_of(reply)["code"]) == (404, "unknown_route")
    said = error_of(reply)["message"]
    assert said.startswith(f"there is no route POST {path}; there is {meant}: ") if meant else said.endswith(path)


@pytest.mark.parametrize(
    ("path", "whose"), [("/api/chat", "Ollama"), ("/completion", "llama.cpp"), ("/slots/", "llama.cpp")]
)
def test_a_route_of_another_server_is_named(server: Any, path: str, whose: str) -> None:
    status, found = server.post(path, {})
    assert status == 404 and f"{whose}'s own API" in found["error"]["message"] and "/v1/" in found["error"]["message"]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
        ("/v1/messages", {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image", "source": {}}]}]}]}),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_as_such(server: Any, route: str, body: dict[str, Any]) -> None:
    status, reply = server.post(route, body)
    assert status == 400 and reply["error"]["message"].endswith("; the model takes texts only"), reply
    reply = server.post(CHAT, {"messages": [{"role": "user", "content": [{"type": "txt"}]}]})[1]
    assert "texts only" not in error_of(reply)["message"]


@pytest.mark.parametrize("said", [b"\\ud83d x", b"\\ud83d\\n", b"\\ude00"])
def test_half_a_pair_of_surrogates_is_named(server: Any, said: bytes) -> None:
    status, _, reply = server.request("POST", COMPLETE, b'{"prompt": "' + said + b'"}', JSON)
    assert status == 400 and "surrogates" in error_of(json.loads(reply))["message"]


def test_a_prediction_does_not_change_the_answer(server: Any) -> None:
    asked = {"max_tokens": 8, "temperature": 0}
    expected = server.chat("Hello", **asked)["choices"][0]["message"]["content"]
    for content in ("Hello", [{"type": "text", "text": "Hello"}]):
        said = server.chat("Hello", prediction={"type": "content", "content": content}, **asked)
        assert said["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000])
def test_broken_json(server: Any, body: bytes) -> None:
    status, _, reply = server.request("POST", COMPLETE, body, JSON)
    assert status == 400
    assert error_of(json.loads(reply))["code"] == "invalid_json"


@pytest.mark.parametrize("body", [b"3", b"[]", b"null", b'"text"'])
def test_json_that_is_no_object(server: Any, body: bytes) -> None:
    for path in (CHAT, COMPLETE, "/tokenize", "/detokenize"):
        status, _, reply = server.request("POST", path, body, JSON)
        assert (status, error_of(json.loads(reply))["code"]) == (400, "invalid_type")


def test_content_type(server: Any) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    status, _, reply = server.request("POST", COMPLETE, b'{"prompt": "x"}', form)
    assert (status, error_of(json.loads(reply))["code"]) == (415, "unsupported_media_type")
    status, _, _ = server.request("POST", COMPLETE, b'{"prompt": "x"}', {"content-type": "application/json; charset=u"})
    assert status == 200


def test_large_body(small_server: Any) -> None:
    status, reply = small_server.post(COMPLETE, {"prompt": "x" * 20_000})
    assert (status, error_of(reply)["code"]) == (413, "body_too_large")
    chunked = iter([b'{"prompt": "', b"x" * 30_000, b'"}'])
    status, _, reply = small_server.request("POST", COMPLETE, chunked, JSON)
    assert (status, error_of(json.loads(reply))["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"this is not HTTP\r\n\r\n", 400, "invalid_http"),
        (b"GET /health HTTP/1.1\r\nX-Long: " + b"a" * 10_000_000, 431, "head_too_large"),
        (b"GET /health HTTP/1.1\r\n" + b"X-Many: a\r\n" * 1_000_000, 431, "head_too_large"),
        (b"GET /" + b"a" * 10_000_000, 431, "head_too_large"),
    ],
)
def test_what_is_not_a_request(server: Any, sent: bytes, status: int, code: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=300) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        received = b""
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                received += chunk
    # With a flood still on its way the close may overtake the answer.
    if received or code == "invalid_http":
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert error_of(json.loads(body))["code"] == code
    assert server.get("/health")[0] == 200


def test_several_requests_over_one_connection(server: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    with contextlib.closing(connection):
        for size in (1, 60_000, 1, 60_000):  # together more than one head may have
            connection.request(
                "POST", "/tokenize", json.dumps({"prompt": "x" * size}), {**JSON, "x-filler": "y" * 60_000}
            )
            response = connection.getresponse()
            assert (response.status, json.loads(response.read())["count"] > 0) == (200, True)


def test_api_keys(small_server: Any) -> None:
    def status_of(path: str, authorization: str | None, method: str = "GET") -> int:
        headers = {} if authorization is None else {"authorization": authorization}
        small_server.headers, kept = {}, small_server.headers
        try:
            status, found, reply = small_server.request(method, path, None, headers)
        finally:
            small_server.headers = kept
        if status == 401:
            assert error_of(json.loads(reply))["code"] == "invalid_api_key"
            assert found["www-authenticate"] == "Bearer"
        return int(status)

    for key in ("first-key", "second-key"):
        assert status_of("/v1/models", f"Bearer {key}") == 200
    for wrong in (None, "", "Bearer", "Bearer wrong", "Bearer first-ke", "Basic first-key", "first-key", "Bearer ÿ"):
        assert status_of("/v1/models", wrong) == 401
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert status_of(path, None) == 200
    for path in ("/tokenize", "/detokenize", CHAT, COMPLETE):
        assert status_of(path, None, "POST") == 401
    for path in ("/openapi.json", "/docs", "/nothing", "/ready/", "//health"):
        assert status_of(path, None) == 401


def test_warn_about_unknown_fields(small_server: Any) -> None:
    status, _ = small_server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1, "tempereture": 1, "x": {"y": 1}})
    assert status == 200
    small_server.wait_until_logged("ignored unknown request field tempereture")
    status, reply = small_server.post(CHAT, {"messages": MESSAGES, "tempereture": 1, "temperature": 9})
    assert (status, error_of(reply)["param"]) == (400, "temperature")


def test_limits_of_the_server(small_server: Any) -> None:
    for body, param in (
        ({"prompt": "x", "n": 5}, "n"),
        ({"prompt": ["x"] * 5}, "prompt"),
        ({"prompt": "x", "logprobs": 4}, "logprobs"),
        ({"prompt": ["x"] * 2, "n": 4}, "n"),  # 8 sequences, never more than 4 at a time
    ):
        status, reply = small_server.post(COMPLETE, body)
        assert (status, error_of(reply)["param"]) == (400, param)


def test_aliases(small_server: Any) -> None:
    for name in ("tiny", "alias"):
        assert small_server.complete("x", max_tokens=1, model=name)["model"] == name
    listed = small_server.get("/v1/models")[1]
    assert [model["id"] for model in listed["data"]] == ["tiny", "alias"]
    # Anthropic's clients read these, and go from page to page.
    assert [model["display_name"] for model in listed["data"]] == ["tiny", "alias"]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == ("tiny", "alias", False)
    (created,) = {datetime.fromisoformat(model["created_at"]).timestamp() for model in listed["data"]}
    assert created == listed["data"][0]["created"]
