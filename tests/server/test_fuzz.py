"""Random requests to every route of the real server: no 500, no hang, and nothing left behind."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from hypothesis import event, given, settings
from hypothesis import strategies as st

from slipstream.server.openai.schema import ChatBody, CompletionBody, DetokenizeBody

ROUTES = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
FIELDS = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *DetokenizeBody.model_fields})
extremes: list[Any] = [2**31, 2**63, 2**64, -(2**63), 10**40, 1e308, 5e-324, -1e308, -0.0, float("nan")]
extremes += ["\0", "%s", "{0.__class__}", "../../x", "a" * 5000, "\ufeff", "🦜", "\r\nx: y"]
plain = st.none() | st.booleans() | st.integers(-3, 60_000) | st.floats(-2, 3) | st.text(max_size=12)
plain |= st.sampled_from(extremes)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
tokens = st.integers(0, 49_151)
text = st.text(max_size=30)
short = st.text(min_size=1, max_size=3)
flag = st.none() | st.booleans()
names = st.text(max_size=8) | st.sampled_from(
    ["template", "messages", "variables", "self", "bos_token", "__init__", "%s"]
)
parts = st.lists(text.map(lambda text: {"type": "text", "text": text}), max_size=2)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": text | parts | st.none()},
        optional={"name": text, "tool_calls": st.sampled_from([None, []]), "reasoning_content": text},
    ),
    min_size=1,
    max_size=3,
)
# What the schemas allow, so that most of these requests reach the engine.
both: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 60_000),
    "min_p": st.floats(0, 1),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.1, 10),
    "logit_bias": st.dictionaries(tokens.map(str), st.floats(-100, 100), max_size=3),
    "allowed_token_ids": st.lists(tokens, min_size=1, max_size=4),
    "bad_words": st.lists(short, max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": short | st.lists(short, max_size=3),
    "stop_token_ids": st.lists(tokens, max_size=3),
    "include_stop_str_in_output": flag,
    "min_tokens": st.integers(0, 3),
    "ignore_eos": flag,
    "prompt_logprobs": st.integers(0, 3),
    "logprobs_mode": st.sampled_from(["raw", "processed"]),
    "skip_special_tokens": flag,
    "stream": flag,
    "return_token_ids": flag,
    "return_tokens_as_token_ids": flag,
    "priority": st.integers(0, 1000),
    "cache_salt": short,
    "user": text,
}
chat = st.fixed_dictionaries(
    {"messages": messages, "max_tokens": st.integers(1, 4), "n": st.sampled_from([None, 1, 2, 3])},
    optional=both
    | {"logprobs": flag, "add_generation_prompt": flag, "continue_final_message": flag}
    | {"chat_template_kwargs": st.dictionaries(names, values, max_size=2)},
)
completion = st.fixed_dictionaries(
    {
        "prompt": text | st.lists(text, min_size=1, max_size=3) | st.lists(tokens, min_size=1, max_size=5),
        "max_tokens": st.integers(0, 4),
        "n": st.sampled_from([None, 1, 2, 3]),
    },
    optional=both | {"logprobs": st.integers(0, 3), "echo": flag, "add_special_tokens": flag},
)
anything = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), values, max_size=2)
AMOUNT_OF_WORK = {"max_tokens", "n", "max_completion_tokens"}


def mixed(body: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A mostly valid body with a few fields replaced by anything but more work."""
    other = {name: value for name, value in other.items() if name not in AMOUNT_OF_WORK}
    return body | other


requests = st.one_of(
    st.tuples(st.just("/v1/chat/completions"), chat),
    st.tuples(st.just("/v1/completions"), completion),
    st.tuples(st.just("/v1/chat/completions"), st.builds(mixed, chat, anything)),
    st.tuples(st.just("/v1/completions"), st.builds(mixed, completion, anything)),
    st.tuples(st.sampled_from(["/tokenize", "/detokenize"]), anything),
    st.tuples(
        st.just("/tokenize"),
        st.fixed_dictionaries({"prompt": text}) | st.fixed_dictionaries({"messages": messages}),
    ),
    st.tuples(st.just("/detokenize"), st.fixed_dictionaries({"tokens": st.lists(tokens, max_size=9)})),
    st.tuples(st.sampled_from(ROUTES), values),
)


@settings(max_examples=300)
@given(request=requests)
def test_no_request_breaks_the_server(server: Any, request: tuple[str, Any]) -> None:
    route, body = request
    # This also holds the answer against the OpenAPI document.
    status, headers, reply = server.request(
        "POST", route, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    event(f"{route} {status}")
    assert status in (200, 400, 404), reply  # 404: another model
    if status != 200:
        error = json.loads(reply)["error"]
        assert set(error) == {"message", "type", "param", "code"}
    elif headers["content-type"].startswith("text/event-stream"):
        assert reply.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in reply
    elif route == "/v1/completions":
        for choice in json.loads(reply)["choices"]:
            offsets = (choice["logprobs"] or {}).get("text_offset", [])
            assert offsets == sorted(offsets)
            assert all(0 <= offset <= len(choice["text"]) for offset in offsets)


@settings(max_examples=100)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]),
    path=st.sampled_from([*ROUTES, "/health", "/ready", "/metrics", "/version", "/v1/models", "/", "/v1"])
    | st.text(st.characters(codec="ascii", categories=("L", "N")), max_size=10).map(lambda name: f"/v1/models/{name}"),
    body=st.binary(max_size=30),
)
def test_no_method_breaks_the_server(server: Any, method: str, path: str, body: bytes) -> None:
    status, headers, reply = server.request(method, path, body, {"content-type": "application/json"})
    assert status in (200, 204, 400, 404, 405), reply
    assert headers["x-request-id"]
    if status not in (200, 204) and method != "HEAD":
        assert headers["content-type"] == "application/json"
        assert set(json.loads(reply)["error"]) == {"message", "type", "param", "code"}


@given(
    method=st.sampled_from(["GET", "POST"]),
    path=st.sampled_from(
        [
            "status",
            "drafters",
            "drafters/prune",
            "drafters/import",
            "drafters/export",
            "evolve",
            "traffic",
            "traffic/purge",
        ]
    )
    | st.builds(
        "drafters/{}/{}".format, st.integers(0, 2**70), st.sampled_from(["promote", "rollback", "pin", "x", ""])
    )
    | st.builds("drafters?{}={}".format, short.map(quote), st.text(max_size=9).map(quote)),
    body=values,
)
def test_no_request_breaks_the_admin_api(server: Any, method: str, path: str, body: Any) -> None:
    sent = json.dumps(body).encode()
    status, _, reply = server.request(method, f"/admin/v1/{path}", sent, {"content-type": "application/json"})
    assert status in (200, 400, 404, 405, 409), reply


def test_nothing_is_left_behind(server: Any) -> None:
    server.wait_until_idle()
    assert server.get("/health") == (200, {"status": "ok"})
