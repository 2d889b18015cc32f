"""What programs made for other servers send by habit, and mean the same by."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from slipstream.server.structured import json_grammar

QUESTION = {"role": "user", "content": "What is the weather in Rome?"}


def prompt(server: Any, *messages: dict[str, Any]) -> str:
    status, found = server.post("/tokenize", {"messages": [QUESTION, *messages]})
    assert status == 200, found
    said: str = server.post("/detokenize", {"tokens": found["tokens"]})[1]["prompt"]
    return said


def test_minus_one_token_is_all_the_room(server: Any) -> None:
    """For llama.cpp, LM Studio and their clients."""
    for field in ("max_tokens", "max_completion_tokens"):
        status, found = server.post("/v1/chat/completions", {"messages": [QUESTION], field: -1, "guided_choice": ["x"]})
        assert status == 200 and found["choices"][0]["message"]["content"] == "x"
    body = {"prompt": [[5] * 8150, [7] * 8100], "max_tokens": -1, "temperature": 0, "ignore_eos": True}
    status, found = server.post("/v1/completions", body)
    assert status == 200
    assert found["usage"]["completion_tokens"] == 42 + 92
    status, found = server.post("/v1/completions", body | {"max_tokens": -2})
    assert status == 400 and found["error"]["param"] == "max_tokens"


def test_a_message_may_say_that_it_is_one(server: Any) -> None:
    """As those of lm-eval's local-chat-completions do."""
    assert prompt(server, QUESTION | {"type": "text"}) == prompt(server, QUESTION | {"type": "message"})
    status, found = server.post("/v1/chat/completions", {"messages": [QUESTION | {"type": "image"}]})
    assert status == 400 and found["error"]["param"] == "messages.0.type"


def test_parts_may_be_called_as_in_responses(server: Any) -> None:
    """As vLLM takes them."""
    expected = prompt(server, {"role": "assistant", "content": "Sun."}, QUESTION)
    for kind in ("text", "input_text", "output_text"):
        said = {"role": "assistant", "content": [{"type": kind, "text": "Sun."}]}
        assert prompt(server, said, QUESTION) == expected
    said = {"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}
    status, found = server.post("/v1/chat/completions", {"messages": [said]})
    assert status == 400 and "takes texts only" in found["error"]["message"]


def test_an_empty_name_is_that_of_the_model(server: Any) -> None:
    """Clients in whose settings it was left empty send it."""
    chat, responses = {"messages": [QUESTION], "max_tokens": 1}, {"input": "x", "max_output_tokens": 1}
    asked = {"/v1/chat/completions": chat, "/v1/messages": chat, "/v1/responses": responses}
    asked |= {"/v1/completions": {"prompt": "x", "max_tokens": 1}, "/v1/embeddings": {"input": "x"}}
    for route, body in asked.items():
        status, found = server.post(route, body | {"model": ""})
        assert status == 200 and found["model"] == server.get("/v1/models")[1]["data"][0]["id"], (route, found)


@pytest.mark.parametrize(
    "said",
    [
        {"content": None, "refusal": "I will not."},
        {"content": "", "refusal": "I will not."},
        {"content": [{"type": "refusal", "refusal": "I will not."}]},
    ],
)
def test_a_refusal_in_the_history_is_what_was_said(server: Any, said: dict[str, Any]) -> None:
    again = {"role": "user", "content": "Why?"}
    expected = prompt(server, {"role": "assistant", "content": "I will not."}, again)
    assert prompt(server, {"role": "assistant", **said}, again) == expected
    if isinstance(said["content"], list):
        items = [QUESTION, {"role": "assistant", **said}, again]
        status, found = server.post("/v1/responses/input_tokens", {"input": items})
        assert status == 200, found


def test_arguments_in_the_history_may_be_the_object_itself(server: Any) -> None:
    """Where OpenAI's API has JSON as text, clients of Ollama, llama.cpp and vLLM send objects."""

    def said(arguments: Any) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "w", "arguments": arguments}}]}

    arguments = {"city": "Zürich", "days": [1, None]}
    assert prompt(server, said(arguments)) == prompt(server, said(json.dumps(arguments, ensure_ascii=False)))
    assert prompt(server, said({})) == prompt(server, said("{}"))
    call = {"type": "function_call", "call_id": "a", "name": "w", "arguments": arguments}
    counts = {
        server.post("/v1/responses/input_tokens", {"input": [QUESTION, call | {"arguments": each}]})[1]["input_tokens"]
        for each in (arguments, json.dumps(arguments, ensure_ascii=False))
    }
    assert len(counts) == 1
    status, found = server.post("/v1/chat/completions", {"messages": [QUESTION, said([1])]})
    assert status == 400 and found["error"]["param"] == "messages.1.tool_calls.0.function.arguments"


NUMBER = {"type": "integer"}


@pytest.mark.parametrize(
    ("rest", "fits", "fits_not"),
    [
        ({"patternProperties": {"^a$": NUMBER}, "additionalProperties": False}, ['{"a":1,"b":2}'], ['{"a":1,"b":2,']),
        (
            {"patternProperties": {"^(?:a|b)$": {"maximum": 5}}, "additionalProperties": False},
            ['{"a":5,"b":2}'],
            ['{"a":6', '{"a":5,"b":6', '{"a":1,"b":2,'],
        ),
        (
            {"patternProperties": {"^a$": NUMBER, "^x": NUMBER}, "additionalProperties": False},
            ['{"a":1,"b":2,"xy":3}'],
            ['{"a":1,"b":2,"c'],
        ),
        ({"patternProperties": {"^b$": NUMBER}}, ['{"a":1,"b":2,"c":"d"}'], []),
        ({"patternProperties": {"^(a|c)$": NUMBER}, "additionalProperties": False}, ['{"a":1,"b":2,"c":3}'], []),
    ],
)
def test_patterns_of_names_that_are_named_anyway_lead_nowhere(
    rest: dict[str, Any], fits: list[str], fits_not: list[str]
) -> None:
    """An object could go on with a comma where nothing may follow it, and blanks until the request failed."""
    schema = {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"], **rest}
    grammar = json_grammar(schema, "schema")
    for text in [*fits, *fits_not]:
        matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
        is_taken = matcher.try_consume_tokens(list(text.encode())) == len(text)
        assert is_taken is (text in fits), text
        assert not is_taken or matcher.is_accepting()
