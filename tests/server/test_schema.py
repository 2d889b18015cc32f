"""Parsing of request bodies: whatever comes, it is a model or an error of the caller that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.validation import BIAS_RANGE, RANGES
from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body, parse
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


NUMBERS = [*RANGES, "seed", "n", "priority", "logprobs", "prompt_logprobs", "best_of"]
WHOLE = [-1, 0, 1, 2, 10, *(2**bits - 1 + more for bits in (31, 63, 64) for more in (0, 1)), 10**400]
written_numbers = st.sampled_from(
    [*map(str, WHOLE), "1" + "0" * 5000, "-0", "-0.0", "1.0", "1e0", "0.01", "0." + "0" * 5000 + "1", "1e-45", "5e-324"]
) | st.sampled_from(["1e-400", "1e308", "-1e308", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "true"])


@given(fields=st.dictionaries(st.sampled_from(NUMBERS), written_numbers, max_size=3), bias=st.none() | written_numbers)
def test_every_number_is_in_its_range_or_refused_by_name(fields: dict[str, str], bias: str | None) -> None:
    members = [f'"{name}": {number}' for name, number in fields.items()]
    if bias is not None:
        members.append(f'"logit_bias": {{"5": {bias}}}')
    try:
        body = parse(CompletionBody, ("{" + ", ".join(['"prompt": "x"', *members]) + "}").encode(), "error")
    except InvalidRequestError as error:
        assert error.code == "invalid_json" or (error.param or "").split(".")[0] in {*fields, "logit_bias"}
        assert len(error.message) < 300
        return
    for name in fields:
        low, high = RANGES.get(name, (-(2**63), 2**63 - 1))
        assert name in ("top_k", "max_tokens") or low <= getattr(body, name) <= high
    assert bias is None or BIAS_RANGE[0] <= body.logit_bias[5] <= BIAS_RANGE[1]  # type: ignore[index]


@pytest.mark.parametrize("field", ["temperature", "repetition_penalty"])
def test_a_refused_number_names_the_range(field: str) -> None:
    low, high = RANGES[field]
    for value, border in ((low - 1e-3, low), (high * 2, high)):
        with pytest.raises(InvalidRequestError, match=f"{border:g}"):
            parse(CompletionBody, json.dumps({"prompt": "x", field: value}).encode(), "error")


@pytest.mark.parametrize("field", ["prompt", "stop_token_ids", "allowed_token_ids"])
@pytest.mark.parametrize("token", ["-1", "true", "1.5", "2147483648", "1" + "0" * 5000, '"5"', "null", "1e400"])
def test_what_is_no_token_id_is_refused(field: str, token: str) -> None:
    body = {"prompt": "[1]"} | {field: f"[1, {token}]"}
    with pytest.raises(InvalidRequestError) as error:
        parse(CompletionBody, ("{" + ", ".join(f'"{n}": {v}' for n, v in body.items()) + "}").encode(), "error")
    assert error.value.code == "invalid_json" or str(error.value.param).startswith(field)


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


@pytest.mark.parametrize(("sent", "found"), [(True, True), (1, True), (0, False), (False, False), (None, None)])
def test_log_probabilities_of_a_chat_may_be_asked_for_by_number(sent: Any, found: bool | None) -> None:
    """Agent-lightning asks with 1 for those of chats, too."""
    data = {"messages": [{"role": "user", "content": "Hello"}], "logprobs": sent}
    body = parse(ChatBody, json.dumps(data).encode(), "error")
    assert isinstance(body, ChatBody) and body.logprobs is found


@pytest.mark.parametrize(("sent", "found"), [(True, 1), (False, None), (None, None), (0, 0), (3, 3), (-1, -1)])
def test_log_probabilities_of_a_completion_may_be_asked_for_as_in_chats(sent: Any, found: int | None) -> None:
    """vLLM and SGLang take both, and clients that know chats send them."""
    body = parse(CompletionBody, json.dumps({"prompt": "x", "logprobs": sent}).encode(), "error")
    assert body.logprobs == found and type(body.logprobs) is type(found)


@pytest.mark.parametrize("sent", [2, -1, 1.0, "true"])
def test_log_probabilities_of_a_chat_are_asked_for_by_nothing_else(sent: Any) -> None:
    data = {"messages": [{"role": "user", "content": "Hello"}], "logprobs": sent}
    with pytest.raises(InvalidRequestError, match="logprobs"):
        parse(ChatBody, json.dumps(data).encode(), "error")
