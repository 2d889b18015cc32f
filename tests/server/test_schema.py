"""Parsing of request bodies: whatever comes, it is a model or an error of the caller that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.server.body import Body, parse
from slipstream.server.errors import InvalidRequestError
from slipstream.server.openai.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeMessagesBody,
    TokenizeTextBody,
)

BODIES: list[type[Body]] = [ChatBody, CompletionBody, TokenizeTextBody, TokenizeMessagesBody, DetokenizeBody]
FIELDS = sorted({name for body in BODIES for name in body.model_fields})
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), values, max_size=6)


@given(body=st.sampled_from(BODIES), data=objects | values, mode=st.sampled_from(["error", "warn"]))
def test_any_json_is_a_model_or_an_error(body: type[Body], data: Any, mode: Any) -> None:
    try:
        found = parse(body, json.dumps(data).encode(), mode)
    except InvalidRequestError as error:
        assert error.message
        # The name leads to a place in the data, or to a field that is missing there.
        assert error.param is None or error.param.split(".")[0] in {*FIELDS, *map(str, data)}
    else:
        assert isinstance(found, body)


@given(body=st.sampled_from(BODIES), data=st.binary(max_size=40))
def test_any_bytes_are_a_model_or_an_error(body: type[Body], data: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse(body, data, "error")


@given(
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    n=st.integers(1, 100),
    stop=st.none() | st.text(min_size=1, max_size=20) | st.lists(st.text(min_size=1, max_size=20), max_size=4),
    bias=st.dictionaries(st.integers(0, 50_000).map(str), st.floats(-100, 100), max_size=5),
)
def test_valid_values_come_through_unchanged(
    temperature: float, top_p: float, n: int, stop: Any, bias: dict[str, float]
) -> None:
    fields = {"temperature": temperature, "top_p": top_p, "n": n, "stop": stop, "logit_bias": bias}
    body = parse(CompletionBody, json.dumps({"prompt": "x", **fields}).encode(), "error")
    assert (body.temperature, body.top_p, body.n, body.stop) == (temperature, top_p, n, stop)
    assert body.logit_bias == {int(token): value for token, value in bias.items()}


@given(name=st.text(min_size=1, max_size=10).filter(lambda name: name not in FIELDS))
def test_unknown_fields_are_named_ignored_or_dropped_when_null(name: str) -> None:
    def text(value: Any) -> bytes:
        return json.dumps({"prompt": "x", name: value}).encode()

    with pytest.raises(InvalidRequestError) as error:
        parse(CompletionBody, text(1), "error")
    assert (error.value.param, error.value.code) == (name, "unknown_parameter")
    assert parse(CompletionBody, text(1), "warn").prompt == "x"
    assert parse(CompletionBody, text(None), "error").prompt == "x"


def test_unknown_fields_inside_of_others() -> None:
    nested = {"messages": [{"role": "user", "content": "x", "colour": "red"}], "stream": True}
    for extra, param in (({}, "messages.0.colour"), ({"stream_options": {"often": True}}, "messages.0.colour")):
        with pytest.raises(InvalidRequestError) as error:
            parse(ChatBody, json.dumps(nested | extra).encode(), "error")
        assert error.value.param == param
    assert parse(ChatBody, json.dumps(nested).encode(), "warn").messages[0].text == "x"


def test_an_unknown_null_does_not_hide_another_error() -> None:
    with pytest.raises(InvalidRequestError) as error:
        parse(CompletionBody, b'{"prompt": "x", "foo": null, "temperature": 7}', "error")
    assert error.value.param == "temperature"
    with pytest.raises(InvalidRequestError) as error:
        parse(CompletionBody, b'{"prompt": "x", "foo": null, "bar": 7, "metadata": {"a": NaN}}', "error")
    assert error.value.param == "bar"


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [("a", str), (["a", "b"], list), ([1, 2], list), ([[1], [2, 3]], list)],
)
def test_forms_of_prompts(prompt: Any, kind: type) -> None:
    body = parse(CompletionBody, json.dumps({"prompt": prompt}).encode(), "error")
    assert body.prompt == prompt
    assert isinstance(body.prompt, kind)
