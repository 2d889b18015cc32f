"""Random requests to the routes of other conversations and to embeddings: no 500, no hang, nothing left behind."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from slipstream.server.anthropic.schema import ContentBlock, MessagesBody
from slipstream.server.openai.schema import EmbeddingsBody
from slipstream.server.respond.schema import Item, RespondBody

plain = st.none() | st.booleans() | st.integers(-3, 60_000) | st.floats(-2, 3) | st.text(max_size=12)
plain |= st.sampled_from([2**63, 1e308, float("nan"), "\0", "🦜", "a" * 3000, "none", "auto", "required"])
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
text = st.text(max_size=20)
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
tool = {"name": "f", "description": "d"}


def mixed(fields: Any, keep: set[str]) -> st.SearchStrategy[dict[str, Any]]:
    """A few fields of these names, or others, with any value."""
    return st.dictionaries(st.sampled_from(sorted(set(fields) - keep)) | text, values, max_size=2)


def with_some(base: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return base | st.builds(lambda body, more: body | more, base, other)


def limited(bodies: Any, fields: Any, most: dict[str, int]) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies, some with other values in a few fields, but for ``most``: so little work they ask for."""
    return with_some(bodies, mixed(fields, set(most))).map(lambda body: body | most)


item = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": text}),
    st.fixed_dictionaries(
        {
            "role": st.just("user"),
            "content": st.lists(st.fixed_dictionaries({"type": st.just("input_text"), "text": text})),
        }
    ),
    st.fixed_dictionaries(
        {"type": st.just("function_call"), "call_id": text, "name": st.just("f"), "arguments": text | st.just("{}")}
    ),
    st.fixed_dictionaries({"type": st.just("function_call_output"), "call_id": text, "output": text}),
    st.fixed_dictionaries({"type": st.just("reasoning"), "summary": st.just([]), "id": text}),
)
responses = st.fixed_dictionaries(
    {"input": text | st.lists(with_some(item, mixed(Item.model_fields, set())), max_size=4)},
    optional={
        "instructions": text,
        "stream": st.booleans(),
        "store": st.booleans(),
        "background": st.booleans(),
        "temperature": st.floats(0, 2),
        "tools": st.just([{"type": "function", "parameters": SCHEMA, **tool}]),
        "tool_choice": st.sampled_from(["none", "auto", "required"]),
        "text": st.just({"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}),
        "previous_response_id": text,
    },
)
block = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": text}),
    st.fixed_dictionaries({"type": st.just("thinking"), "thinking": text}),
    st.fixed_dictionaries({"type": st.just("tool_use"), "id": text, "name": st.just("f"), "input": st.just({})}),
    st.fixed_dictionaries({"type": st.just("tool_result"), "tool_use_id": text, "content": text}),
)
blocks = st.lists(with_some(block, mixed(ContentBlock.model_fields, set())), max_size=3)
turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": text | blocks})
messages = st.fixed_dictionaries(
    {"messages": st.lists(turn, min_size=1, max_size=3)},
    optional={
        "system": text,
        "stream": st.booleans(),
        "tools": st.just([{"input_schema": SCHEMA, **tool}]),
        "tool_choice": st.fixed_dictionaries({"type": st.sampled_from(["auto", "any", "none"])}),
        "stop_sequences": st.lists(st.text(min_size=1, max_size=3), max_size=2),
    },
)
embeddings = st.fixed_dictionaries(
    {"input": text | st.lists(text, max_size=3) | st.lists(st.integers(0, 49_151), max_size=5)},
    optional={"pooling": st.sampled_from(["mean", "last"]), "dimensions": st.integers(1, 100)},
)
requests = st.one_of(
    st.tuples(st.just("/v1/responses"), limited(responses, RespondBody.model_fields, {"max_output_tokens": 4})),
    st.tuples(st.just("/v1/messages"), limited(messages, MessagesBody.model_fields, {"max_tokens": 4})),
    st.tuples(st.just("/v1/messages/count_tokens"), messages | values),
    st.tuples(st.just("/v1/embeddings"), limited(embeddings, EmbeddingsBody.model_fields, {})),
)


@settings(max_examples=150)
@given(request=requests)
def test_no_request_breaks_the_server(server: Any, request: tuple[str, Any]) -> None:
    route, body = request
    # This also holds the answer against the OpenAPI document.
    status, headers, reply = server.request(
        "POST", route, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    event(f"{route} {status}")
    assert status in (200, 400, 404), reply
    if headers["content-type"].startswith("text/event-stream"):
        last = json.loads(reply.decode().split("\n\n")[-2].partition("data: ")[2])
        assert last["type"] in ("message_stop", "response.completed", "response.incomplete")


def test_nothing_is_left_behind(server: Any) -> None:
    server.wait_until_idle()
    assert "Traceback" not in "".join(server.log)
