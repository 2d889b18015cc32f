"""/v1/messages: Anthropic's dialect."""

from __future__ import annotations

import json
from typing import Any

import pytest

CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Bern"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
WEATHER = {"name": "weather", "description": "Now.", "input_schema": CITY}
MESSAGES: Any = [{"role": "user", "content": "What is the weather in Rome?"}]


def ask(server: Any, **fields: Any) -> Any:
    body = {"model": "tiny-model", "messages": MESSAGES, "max_tokens": 8, "temperature": 0, **fields}
    status, found = server.post("/v1/messages", body)
    assert status == 200, found
    return found


def events(server: Any, **fields: Any) -> list[Any]:
    body = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "stream": True, **fields}
    data = json.dumps(body).encode()
    status, headers, reply = server.request("POST", "/v1/messages", data, {"content-type": "application/json"})
    assert status == 200 and headers["request-id"] == headers["x-request-id"]
    found = []
    for event in reply.decode().split("\n\n")[:-1]:
        name, _, data = event.partition("\ndata: ")
        found.append(json.loads(data))
        assert name == f"event: {found[-1]['type']}"
    return found


def put_together(stream: list[Any]) -> Any:
    """The message as the client of this API makes it of its events."""
    message = stream[0]["message"]
    texts: dict[int, str] = {}
    for event in stream[1:]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_delta":
                delta = event["delta"]
                kind = {"text_delta": "text", "input_json_delta": "partial_json"}[delta["type"]]
                texts[event["index"]] = texts.get(event["index"], "") + delta[kind]
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
    for index, text in texts.items():
        block = message["content"][index]
        block |= {"text": text} if block["type"] == "text" else {"input": json.loads(text)}
    assert stream[-1] == {"type": "message_stop"}
    return message


def alike(message: Any) -> Any:
    """Without what is different every time."""
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return message | {"id": "", "content": content, "usage": message["usage"]["output_tokens"]}


def test_an_answer_is_that_of_chat(server: Any) -> None:
    chat = server.chat(messages=[{"role": "system", "content": "Be brief."}, *MESSAGES], max_tokens=8)
    found = ask(server, system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}])
    assert found["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]
    assert (found["stop_reason"], found["stop_sequence"]) == ("max_tokens", None)
    usage = found["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    status, counted = server.post("/v1/messages/count_tokens", {"messages": MESSAGES, "system": "Be brief."})
    assert (status, counted) == (200, {"input_tokens": chat["usage"]["prompt_tokens"]})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 200},
        {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 400},
        {"output_config": {"format": {"type": "json_schema", "schema": CITY}}, "max_tokens": 100},
    ],
)
def test_a_stream_adds_up_to_the_answer(server: Any, fields: Any) -> None:
    whole = ask(server, **fields)
    assert alike(put_together(events(server, **fields))) == alike(whole)
    if "tools" in fields:
        is_cut_off = whole["stop_reason"] == "max_tokens"
        assert not is_cut_off or len(whole["content"]) > 5
        for block in whole["content"][: -1 if is_cut_off else None]:
            assert block["type"] == "tool_use" and block["name"] == "weather"
            assert block["input"] in ({"city": "Rome"}, {"city": "Bern"})
    elif fields:
        assert json.loads(whole["content"][0]["text"])["city"] in ("Rome", "Bern")


def test_what_does_not_fit_is_counted_all_the_same(server: Any) -> None:
    turns = [{"role": "user", "content": "word " * 9000}]
    status, counted = server.post("/v1/messages/count_tokens", {"messages": turns})
    assert status == 200 and counted["input_tokens"] > 9000
    status, refused = server.post("/v1/messages", {"messages": turns, "max_tokens": 1})
    assert status == 400 and "context" in refused["error"]["message"]


def test_a_stop_sequence_is_told(server: Any) -> None:
    text = ask(server)["content"][0]["text"]
    found = ask(server, stop_sequences=[text[4:7], "unseen"])
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", text[4:7])
    assert put_together(events(server, stop_sequences=[text[4:7]]))["stop_sequence"] == text[4:7]


def test_what_tools_gave_back_reaches_the_prompt(server: Any) -> None:
    use: Any = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}
    use["caller"] = {"type": "direct"}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "22 degrees"}]}
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, use]},
        {"role": "user", "content": [result | {"is_error": True}, {"type": "text", "text": "Well?"}]},
    ]
    call = {"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    same = [
        *MESSAGES,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "Error: 22 degrees"},
        {"role": "user", "content": "Well?"},
    ]
    function = {"name": "weather", "description": "Now.", "parameters": CITY}
    _, wanted = server.post("/tokenize", {"messages": same, "tools": [{"type": "function", "function": function}]})
    _, counted = server.post("/v1/messages/count_tokens", {"messages": turns, "tools": [WEATHER]})
    assert counted["input_tokens"] == wanted["count"]


def test_what_asks_for_nothing_of_a_tool_is_taken(server: Any) -> None:
    tool = WEATHER | {"type": "custom", "cache_control": {"type": "ephemeral"}, "defer_loading": False}
    assert ask(server, tools=[tool | {"allowed_callers": ["direct"], "input_examples": None}])["content"]


def test_what_forgets_nothing_of_the_conversation_is_taken(server: Any) -> None:
    keep_all = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    for context_management in ({"edits": []}, keep_all):
        assert ask(server, context_management=context_management, speed="standard")["content"]


def test_an_answer_that_has_begun_goes_on(server: Any) -> None:
    turns = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    chat = server.chat(messages=turns, continue_final_message=True, max_tokens=8)
    assert ask(server, messages=turns)["content"][0]["text"] == chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"name": "x", "input_schema": 5}]}, "tools.0.input_schema"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [{**WEATHER, "surprise": False}]}, "tools.0.surprise"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"compaction": {"type": "enabled"}}, "compaction: not supported"),
        ({"thread": {"type": "create"}}, "thread: not supported"),
        ({"inference_geo": "eu"}, "inference_geo: not supported"),
        ({"metadata": {"user_id": 5}}, "metadata.user_id"),
        ({"metadata": {"user_id": "u" * 513}}, "metadata.user_id"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_is_not_done_is_refused_in_the_shape_of_this_dialect(server: Any, fields: Any, word: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 8, **fields}
    status, found = server.post("/v1/messages", body)
    assert (status, found["type"], found["error"]["type"]) == (400, "error", "invalid_request_error"), found
    assert word in found["error"]["message"]
    assert found["request_id"]
    # A client that holds conversations in threads goes on without one when it reads this.
    assert found["error"].get("details") == (
        {"error_code": "thread_unsupported_request"} if "thread" in fields else None
    )


def test_what_other_models_thought_in_secret_is_taken_and_left_out(server: Any) -> None:
    def counted(*blocks: dict[str, str]) -> int:
        said = [{"type": "text", "text": "Sunny."}]
        messages = [*MESSAGES, {"role": "assistant", "content": [*blocks, *said]}, *MESSAGES]
        status, found = server.post("/v1/messages/count_tokens", {"messages": messages})
        assert status == 200, found
        tokens: int = found["input_tokens"]
        return tokens

    assert (
        counted({"type": "redacted_thinking", "data": "EmwKAhgB"})
        == counted({"type": "redacted_thinking"})
        == counted()
    )
    hidden = {"role": "user", "content": [{"type": "redacted_thinking", "data": "x"}]}
    status, found = server.post("/v1/messages", {"messages": [hidden], "max_tokens": 1})
    assert status == 400 and "redacted_thinking" in found["error"]["message"]


def test_errors_of_the_gate_have_that_shape_too_and_keys_come_in_a_header_of_their_own(small_server: Any) -> None:
    data = json.dumps({"messages": MESSAGES, "max_tokens": 2}).encode()
    headers = {"content-type": "application/json", "x-api-key": "second-key", "authorization": ""}
    before, small_server.headers = small_server.headers, {}
    try:
        status, _, reply = small_server.request("POST", "/v1/messages", data, {"content-type": "application/json"})
        assert (status, json.loads(reply)["error"]["type"]) == (401, "authentication_error")
        del headers["authorization"]
        for key, wanted in (("second-key", 200), ("third-key", 401)):
            status, _, reply = small_server.request("POST", "/v1/messages", data, headers | {"x-api-key": key})
            assert status == wanted, reply
        assert small_server.request("GET", "/v1/models", headers={"x-api-key": "first-key"})[0] == 200
    finally:
        small_server.headers = before
    status, _, reply = small_server.request("POST", "/v1/messages", b"x" * 30_000, headers)
    assert (status, json.loads(reply)["error"]["type"]) == (413, "request_too_large")
