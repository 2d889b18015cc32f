"""The order and the content of server-sent events."""

from __future__ import annotations

from typing import Any

import pytest

CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
ANSWER = "The capital of France is Paris."


def test_chat_events_come_in_the_reference_order(default_server: Any) -> None:
    *events, done = default_server.events(CHAT, QUESTION | {"stream_options": {"include_usage": True}})
    first, *deltas, finish, usage = events
    assert done == "[DONE]"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"]["content"] for event in deltas) == ANSWER
    assert all(event["choices"][0]["finish_reason"] is None for event in [first, *deltas])
    assert finish["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert all(event["usage"] is None for event in [first, *deltas, finish])
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1


def test_without_include_usage_there_is_none(default_server: Any) -> None:
    *events, _ = default_server.events(CHAT, QUESTION)
    assert all("usage" not in event for event in events)
    assert all(event["choices"] for event in events)


def test_continuous_usage(default_server: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, _ = default_server.events(CHAT, QUESTION | {"stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_chat_token_ids_and_logprobs_add_up_to_the_whole_answer(default_server: Any) -> None:
    ask = QUESTION | {"return_token_ids": True, "logprobs": True, "top_logprobs": 2, "temperature": 0}
    whole = default_server.post(CHAT, ask)[1]
    *events, _ = default_server.events(CHAT, ask)
    first, *rest = events
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any("prompt_token_ids" in event for event in rest)
    choices = [event["choices"][0] for event in events]
    tokens = [token for choice in choices for token in choice.get("token_ids", [])]
    logprobs = [entry for choice in choices for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert tokens == whole["choices"][0]["token_ids"]
    assert [entry["token"] for entry in logprobs] == [
        entry["token"] for entry in whole["choices"][0]["logprobs"]["content"]
    ]


@pytest.mark.parametrize("stop", [None, ["Paris"], ["capital of France is P", "zzz"]])
def test_a_stream_says_what_the_whole_answer_says(default_server: Any, stop: list[str] | None) -> None:
    ask = QUESTION | {"stop": stop, "temperature": 0, "max_tokens": 50}
    whole = default_server.post(CHAT, ask)[1]["choices"][0]
    *events, _ = default_server.events(CHAT, ask)
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == whole["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert events[-1]["choices"][0]["stop_reason"] == whole["stop_reason"]


def test_events_of_several_choices_are_told_apart_by_their_index(default_server: Any) -> None:
    ask = QUESTION | {"n": 3, "seed": 5, "temperature": 1, "max_tokens": 12, "ignore_eos": True}
    whole = default_server.post(CHAT, ask)[1]["choices"]
    *events, _ = default_server.events(CHAT, ask)
    for index in range(3):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == whole[index]["message"]["content"]
        assert [choice["finish_reason"] for choice in mine].count("length") == 1
        assert mine[-1]["finish_reason"] == "length"


def test_completion_stream_with_echo_and_logprobs(default_server: Any) -> None:
    ask = {"prompt": "1, 2, 3,", "echo": True, "logprobs": 1, "max_tokens": 6, "temperature": 0}
    whole = default_server.post("/v1/completions", ask)[1]["choices"][0]
    *events, _ = default_server.events("/v1/completions", ask)
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert len([item for part in parts for item in part[name]]) == len(whole["logprobs"][name])
    assert [token for part in parts for token in part["tokens"]] == whole["logprobs"]["tokens"]
    assert [offset for part in parts for offset in part["text_offset"]] == whole["logprobs"]["text_offset"]


def test_completion_stream_returns_ids_and_prompt_logprobs_once(default_server: Any) -> None:
    ask = {"prompt": [33, 28], "return_token_ids": True, "prompt_logprobs": 0, "max_tokens": 4}
    *events, _ = default_server.events("/v1/completions", ask | {"n": 2})
    for index in range(2):
        first, *rest = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert first["prompt_token_ids"] == [33, 28]
        assert len(first["prompt_logprobs"]) == 2
        assert not any("prompt_token_ids" in choice or "prompt_logprobs" in choice for choice in rest)
        assert sum(len(choice.get("token_ids", [])) for choice in [first, *rest]) == 4


def test_characters_of_several_tokens_arrive_whole(default_server: Any) -> None:
    parrot = default_server.post("/tokenize", {"prompt": "🦜"})[1]["tokens"]
    assert len(parrot) > 2
    # Biases that make the model say the tokens of one emoji, in whatever order: no event may hold half a character
    # unless the text really has an unfinished one.
    ask = {"prompt": "Emoji:", "allowed_token_ids": parrot, "max_tokens": 40, "temperature": 1, "seed": 2}
    whole = default_server.post("/v1/completions", ask)[1]["choices"][0]["text"]
    *events, _ = default_server.events("/v1/completions", ask | {"temperature": 1})
    assert "".join(event["choices"][0]["text"] for event in events) == whole


def test_the_stream_of_a_refused_request_is_a_plain_error(default_server: Any) -> None:
    status, reply = default_server.post(CHAT, QUESTION | {"stream": True, "max_tokens": 10**6})
    assert status == 400
    assert reply["error"]["code"] == "context_length_exceeded"


def test_a_server_may_send_fewer_events(start_local: Any) -> None:
    server = start_local(stream_interval=5)
    ask = {"prompt": [400] * 4, "max_tokens": 23, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
    whole = server.post("/v1/completions", ask)[1]["choices"][0]
    *events, _ = server.events("/v1/completions", ask)
    sizes = [len(event["choices"][0].get("token_ids", [])) for event in events]
    # How many there are depends on how fast they are read; the first one, and what the last one holds, may be less.
    assert sum(sizes) == 23 and all(size >= 5 for size in sizes[1:-2])
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]
