"""/v1/responses, through the OpenAI client unchanged where it knows a thing, and raw where it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from slipstream.server.generation import Piece
from slipstream.server.respond.schema import ReasoningOptions, RespondBody
from slipstream.server.respond.store import ResponseStore, Stored
from slipstream.server.respond.writer import ResponseWriter
from slipstream.server.text import load_tokenizer
from slipstream.server.tools.answer import Speech
from tests.server.respond.asked import QUESTION, ask


class City(BaseModel):
    name: Literal["Rome", "Bern"]


WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": City.model_json_schema() | {"additionalProperties": False},
    "strict": True,
}


def test_an_answer_is_that_of_chat(server: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    chat = server.chat(messages=messages, max_tokens=8)
    found = ask(server, instructions="Be brief.", input=[{"role": "user", "content": QUESTION}])
    [item] = found["output"]
    assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert found["status"] == "incomplete" and found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert found["usage"]["output_tokens"] == chat["usage"]["completion_tokens"] == 8


def test_a_stream_adds_up_to_the_answer(server: Any, client: openai.OpenAI) -> None:
    whole = ask(server)
    events: list[Any] = []
    with client.responses.create(
        model="tiny-model", input=QUESTION, temperature=0, max_output_tokens=8, stream=True
    ) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"] == events[-1].response.output_text


def test_calls_that_have_to_come(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny-model", "input": QUESTION, "tools": [WEATHER], "max_output_tokens": 200}
    for choice in ("required", {"type": "function", "name": "weather"}):
        with client.responses.stream(**asked, tool_choice=choice, parallel_tool_calls=False) as stream:
            told = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
            final = stream.get_final_response()
        [call] = final.output
        assert call.type == "function_call" and call.name == "weather" and call.call_id
        City.model_validate_json(call.arguments)
        assert "".join(told) == call.arguments
    history: Any = [
        {"role": "user", "content": QUESTION},
        call,
        {"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"},
    ]
    assert client.responses.create(**(asked | {"input": history, "max_output_tokens": 8})).output


def test_text_of_a_schema_is_parsed(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny-model", "input": QUESTION, "text_format": City, "max_output_tokens": 100}
    assert isinstance(client.responses.parse(**asked).output_parsed, City)
    with client.responses.stream(**asked) as stream:
        assert isinstance(stream.get_final_response().output_parsed, City)


def test_a_conversation_goes_on_from_what_is_kept(server: Any, client: openai.OpenAI) -> None:
    first = ask(server, instructions="Be brief.")
    second = ask(server, input="And in Bern?", previous_response_id=first["id"])
    items = [{"role": "user", "content": QUESTION}, *first["output"], {"role": "user", "content": "And in Bern?"}]
    alike = ask(server, input=items, store=False)
    assert second["usage"]["input_tokens"] == alike["usage"]["input_tokens"]
    assert second["output"][0]["content"] == alike["output"][0]["content"]
    assert client.responses.retrieve(second["id"]).output_text == second["output"][0]["content"][0]["text"]
    client.responses.delete(first["id"])
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first["id"])
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(alike["id"])
    third = ask(server, input="And in Oslo?", previous_response_id=second["id"])
    assert third["usage"]["input_tokens"] > second["usage"]["input_tokens"], "it holds the turns before it"
    status, found = server.post("/v1/responses", {"input": "x", "previous_response_id": first["id"]})
    assert (status, found["error"]["code"]) == (400, "previous_response_not_found")
    status, found = server.post("/v1/responses", {"input": "x", "previous_response_id": ""})
    assert (status, found["error"]["code"]) == (400, "previous_response_not_found")
    status, found = server.request("POST", "/v1/responses", b'{"input": "x", "previous\\u005fresponse_id": "resp_1"}')[
        ::2
    ]
    assert status == 400 and b"previous_response_id" in found


def test_tokens_of_the_input_are_counted(server: Any, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny-model", "instructions": "Be brief.", "tools": [WEATHER]}
    first = client.responses.create(input="Hello", max_output_tokens=4, **asked)
    assert client.responses.input_tokens.count(input="Hello", **asked).input_tokens == first.usage.input_tokens  # type: ignore[union-attr]
    later: Any = {"input": "Go on", "previous_response_id": first.id, **asked}
    counted = client.responses.input_tokens.count(**later).input_tokens
    assert counted == client.responses.create(max_output_tokens=4, **later).usage.input_tokens  # type: ignore[union-attr]
    path = "/v1/responses/input_tokens"
    status, found = server.post(path, {"input": "x" * 200_000})
    assert status == 200 and found["object"] == "response.input_tokens" and found["input_tokens"] > 32_768
    for body, param in (
        ({}, "input"),
        ({"input": "x", "max_output_tokens": 5}, "max_output_tokens"),
        ({"input": "x", "previous_response_id": "resp_0"}, "previous_response_id"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}}},
         "text.format.schema.type"),
    ):  # fmt: skip
        status, found = server.post(path, body)
        assert (status, found["error"]["param"]) == (400, param), found


def test_items_that_are_kept_can_be_referred_to(server: Any) -> None:
    """As a client does that knows their ids and thinks that the server keeps them."""
    first = ask(server)
    [item] = first["output"]
    reference, more = {"type": "item_reference", "id": item["id"]}, {"role": "user", "content": "And in Bern?"}
    found = ask(server, input=[{"role": "user", "content": QUESTION}, reference, more])
    alike = ask(server, input=[{"role": "user", "content": QUESTION}, item, more], store=False)
    assert found["usage"]["input_tokens"] == alike["usage"]["input_tokens"]
    assert found["output"][0]["content"] == alike["output"][0]["content"]
    assert server.request("DELETE", f"/v1/responses/{first['id']}")[0] == 200
    status, refused = server.post("/v1/responses", {"input": [reference, more]})
    assert (status, refused["error"]["code"]) == (400, "item_not_found")
    third = ask(server, input="And in Oslo?", previous_response_id=found["id"])
    assert third["usage"]["input_tokens"] > found["usage"]["input_tokens"], "what was referred to is kept with it"


def test_a_long_history_is_read_where_it_holds_up_nobody(server: Any) -> None:
    """In a process of its own, as every long body."""
    first = ask(server, input="word " * 4000)
    second = ask(server, previous_response_id=first["id"])
    assert second["usage"]["input_tokens"] > 4000


def test_nobody_sees_those_of_another_key(small_server: Any) -> None:
    found = ask(small_server)
    other = {"authorization": "Bearer second-key", "content-type": "application/json"}
    path = f"/v1/responses/{found['id']}"
    assert [small_server.request(method, path, headers=other)[0] for method in ("GET", "DELETE")] == [404, 404]
    assert small_server.request("POST", path + "/cancel", b"{}", other)[0] == 404
    body = json.dumps({"input": "x", "previous_response_id": found["id"]}).encode()
    assert small_server.request("POST", "/v1/responses", body, other)[0] == 400
    body = json.dumps({"input": [{"type": "item_reference", "id": found["output"][0]["id"]}]}).encode()
    assert [small_server.request("POST", "/v1/responses", body, who)[0] for who in ({}, other)] == [200, 400]
    assert small_server.get(path)[0] == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.id"),
        ({"input": [{"type": "item_reference"}]}, "input.0.id"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, "input.0.call_id"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "name": ""}]}, "tools.0.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"truncation": "first"}, "truncation"),
        ({"include": ["everything"]}, "include"),
        ({"background": True, "store": False}, "store"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": -2}, "max_output_tokens"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"input": "word " * 9000}, "input"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"surprise": 1}, "surprise"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused(server: Any, fields: Any, param: str) -> None:
    status, found = server.post("/v1/responses", {"input": "x", **fields})
    assert (status, found["error"]["param"]) == (400, param), found
    assert param.split(".")[0] in found["error"]["message"] or "context" in found["error"]["message"]


def test_what_asks_for_nothing_is_taken(server: Any) -> None:
    short = {"type": "json_schema", "name": "short", "schema": {"const": "yes"}}
    assert ask(server, max_output_tokens=-1, text={"format": short})["status"] == "completed"
    fields = {
        "client_metadata": {"session_id": "1"},
        "reasoning": {"summary": "detailed"},
        "prompt_cache_key": "k",
        "include": ["reasoning.encrypted_content", "web_search_call.action.sources"],
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "prompt_cache_breakpoint": {}}]}],
    }
    assert ask(server, **fields, store=False, text={"verbosity": "medium"})["output"]


def test_reasoning_comes_as_an_item_and_goes_back_as_one(start_local: Callable[..., Any], tmp_path: Path) -> None:
    template = tmp_path / "thinks.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
        "{% endif %}{{ m.content }}\n{% endfor %}assistant: <think>"
    )
    server = start_local(chat_template=str(template), max_model_len=2048)
    whole = ask(server)
    [item] = whole["output"]
    assert item["type"] == "reasoning" and item["content"][0]["text"]
    assert 0 < whole["usage"]["output_tokens_details"]["reasoning_tokens"] <= 8
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        asked: Any = {"model": "tiny-model", "input": QUESTION, "temperature": 0, "max_output_tokens": 8}
        with client.responses.create(**asked, stream=True) as stream:
            events: list[Any] = list(stream)
    told = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert told == item["content"][0]["text"]
    again = ask(server, input=[{"role": "user", "content": QUESTION}, item, {"role": "user", "content": "So?"}])
    assert again["usage"]["input_tokens"] > whole["usage"]["input_tokens"] + 8

    thought = [{"role": "assistant", "content": "Yes.", name: "It is."} for name in ("reasoning_content", "reasoning")]
    blocks = [{"type": "thinking", "thinking": "It ", "signature": "x"}, {"type": "thinking", "thinking": "is."}]
    litellm = {"provider_specific_fields": {"refusal": None}, "thinking_blocks": blocks}
    thought.append({"role": "assistant", "content": "Yes.", **litellm})
    first, second, third, neither = (
        server.post("/tokenize", {"messages": [message]})[1]["tokens"]
        for message in (*thought, {"role": "assistant", "content": "Yes."})
    )
    assert first == second == third != neither

    messages = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "temperature": 0}
    status, found = server.post("/v1/messages", messages | {"thinking": {"type": "enabled", "budget_tokens": 1024}})
    assert status == 200
    assert found["content"] == [{"type": "thinking", "thinking": item["content"][0]["text"], "signature": ""}]
    names = [event["type"] for event in message_events(server, messages)]
    assert names[:2] == ["message_start", "content_block_start"]

    omitted = messages | {"thinking": {"type": "adaptive", "display": "omitted"}}
    empty = {"type": "thinking", "thinking": "", "signature": ""}
    assert server.post("/v1/messages", omitted)[1]["content"] == [empty]
    told = message_events(server, omitted)
    assert [event["content_block"] for event in told if event["type"] == "content_block_start"] == [empty]
    assert not any(event["type"] == "content_block_delta" for event in told)
    counted = [
        server.post("/v1/messages/count_tokens", {"messages": [{"role": "assistant", "content": content}]})[1]
        for content in ([empty, {"type": "text", "text": "Yes."}], "Yes.")
    ]
    assert counted[0] == counted[1]


def message_events(server: Any, body: Any) -> list[Any]:
    data = json.dumps({**body, "stream": True}).encode()
    status, _, reply = server.request("POST", "/v1/messages", data, {"content-type": "application/json"})
    assert status == 200, reply
    return [json.loads(event.partition("data: ")[2]) for event in reply.decode().split("\n\n")[:-1]]


@pytest.mark.parametrize("finish", ["stop", "length", "abort"])
@pytest.mark.parametrize("pieces", [["Hm.</think>Yes"], ["Hm.", "</think>", "Yes"]])
def test_items_end_as_the_whole_response_says(pieces: list[str], finish: Any) -> None:
    """However much of the answer comes at once: what was cut off is its last item."""
    generation: Any = SimpleNamespace(name="resp_1", count_tokens=lambda: (1, 0, 2))
    asked = RespondBody(input="x", reasoning=ReasoningOptions(effort="low"))
    speech = Speech(reasoning="think", is_open=True)
    writer = ResponseWriter(generation, asked, "model", speech, load_tokenizer("default"), lambda response: None)
    told = b""
    for number, text in enumerate(pieces):
        end = finish if number == len(pieces) - 1 else None
        told += writer.chunk(generation, Piece(text, [1], [], number == 0, end))
    events = [json.loads(each.partition(b"data: ")[2]) for each in (told + writer.end()).split(b"\n\n")[:-1]]
    response = events[-1]["response"]
    ended = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert ended == response["output"]
    last = "completed" if finish == "stop" else "incomplete"
    assert [item["status"] for item in ended] == ["completed", last]
    assert response["completed_at"] is None if finish != "stop" else isinstance(response["completed_at"], int)
    assert response["reasoning"] == {"effort": "low", "summary": None}


SIZES = st.integers(0, 60)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 8), SIZES, st.booleans()), max_size=40))
def test_a_store_keeps_to_its_bounds_and_knows_what_it_holds(puts: Any) -> None:
    store = ResponseStore(most=3, most_bytes=100, in_all=180)
    last: dict[tuple[str, str], bytes] = {}
    for owner, number, size, shared in puts:
        name = f"r{number}"
        stored = Stored(owner, name, b"x" * size, is_open=False, turns=(b"y" * 9,) if shared else ())
        store.put(stored)
        last[owner, name] = stored.body
        found = list(store._stored.values())
        assert store.num_bytes == sum(len(each.body) + sum(map(len, each.turns)) for each in found) <= 180
        for each in "abc":
            own = [one for one in found if one.owner == each]
            assert len(own) <= 3 and sum(one.size for one in own) <= 100
        if size + 9 <= 100:
            assert store.get(owner, name) is stored, "the latest is there"
        assert all(last[one.owner, one.id] == one.body for one in found)
