"""The cost of bodies: it grows with their size only, whatever they are made of, and what comes back of it is short."""

from __future__ import annotations

import gc
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.server.errors import MAX_MESSAGE_CHARS, MAX_PARAM_CHARS, ApiError
from slipstream.server.http.body import Body, parse
from slipstream.server.openai.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeMessagesBody

FACTOR = 16
"""How much larger the larger body is. Quadratic cost would make it 256 times as slow."""
ITEMS = [
    *("0", '"a"', "[]", "{}", "null", "[0]", '""', "1e999", "-1", '{"a":null}', "[[[[0]]]]", "{}"),
    *('{"role":"user","content":"a","b":null}', '{"type":"text","text":"a","b":0}', '"\\u00e9\\n"', "1" * 400),
]
LISTS = [
    *(
        '{"prompt":[%s]}',
        '{"prompt":[0,%s]}',
        '{"prompt":["a",%s]}',
        '{"prompt":[[0],%s]}',
        '{"prompt":"x","stop":[%s]}',
    ),
    *('{"prompt":"x","bad_words":[%s]}', '{"prompt":"x","a":[%s]}', '{"prompt":"x","suffix":[%s]}', "[%s]"),
    *('{"messages":[%s]}', '{"messages":[{"role":"user","content":[%s]}]}', '{"messages":[],"tools":[%s]}'),
    *('{"tokens":[%s]}', '{"prompt":"x","allowed_token_ids":[%s]}', '{"prompt":"x","stop_token_ids":[%s]}'),
]
OBJECTS = [
    *('{"prompt":"x",%s}', '{"prompt":"x","logit_bias":{%s}}', '{"prompt":"x","metadata":{%s}}'),
    *('{"messages":[{"role":"user","content":"x",%s}]}', '{"messages":[],"chat_template_kwargs":{%s}}'),
]
NAMES = ['"f{}"', '"{}"', '"prompt{}"', '"same"', '"' + "long" * 50 + '{}"']
models = st.sampled_from([ChatBody, CompletionBody, DetokenizeBody, TokenizeMessagesBody])
shapes = st.tuples(st.sampled_from(LISTS), st.just(None), st.sampled_from(ITEMS)) | st.tuples(
    st.sampled_from(OBJECTS), st.sampled_from(NAMES), st.sampled_from(ITEMS)
)
Shape = tuple[str, str | None, str]


def made_of(shape: Shape, count: int) -> bytes:
    frame, name, item = shape
    parts = [item if name is None else f"{name.format(index)}:{item}" for index in range(count)]
    return (frame % ",".join(parts)).encode()


def cost(model: type[Body], body: bytes) -> float:
    """Processor seconds of this thread, the least of three tries."""
    found = []
    gc.disable()  # a collection would look at everything the tests have made
    try:
        for _ in range(3):
            begin = time.thread_time()
            try:
                parse(model, body, "error")
            except ApiError as error:
                assert len(error.message) <= MAX_MESSAGE_CHARS
                assert len(error.param or "") <= MAX_PARAM_CHARS
            found.append(time.thread_time() - begin)
    finally:
        gc.enable()
    return min(found)


@settings(max_examples=50)
@given(model=models, shape=shapes)
def test_the_cost_of_a_body_grows_with_its_size(model: type[Body], shape: Shape) -> None:
    for _ in range(10):  # a processor may be slower for a moment; what costs more and more always does
        small, large = (cost(model, made_of(shape, count)) for count in (200, 200 * FACTOR))
        if large < 3 * FACTOR * max(small, 2e-4):
            return
    raise AssertionError(f"{FACTOR} times as much takes {large / small:.0f} times as long: {large:.4f} s")


def test_a_hundred_thousand_unknown_null_fields() -> None:
    body = made_of(('{"prompt":"x",%s}', '"f{}"', "null"), 100_000)
    assert parse(CompletionBody, body, "error").prompt == "x"


@pytest.mark.parametrize("place", ["name", "value", "model"])
def test_what_is_repeated_of_a_body_is_short(place: str, caplog: pytest.LogCaptureFixture) -> None:
    long = "line\\n" * 100_000
    text = {
        "name": '{"prompt":"x","%s":1}',
        "value": '{"prompt":"x","temperature":"%s"}',
        "model": '{"prompt":"x","speculation":{"%s":1}}',
    }
    body = (text[place] % long).encode()
    with pytest.raises(ApiError) as error:
        parse(CompletionBody, body, "error")
    assert len(error.value.body()) < 4000
    if place != "value":
        assert parse(CompletionBody, body, "warn").prompt == "x"
        [line] = caplog.messages
        assert len(line) < 400
        assert "\n" not in line


def test_whole_numbers_may_be_written_as_others_write_them() -> None:
    """JSON has one type of numbers; programs in R, Lua or with pandas send 3.0."""
    sent = (
        b'{"prompt":[1.0,2],"max_tokens":3.0,"seed":7e0,"n":1.0,"temperature":0.5,"stop_token_ids":[4.0],"user":"3.0"}'
    )
    found = parse(CompletionBody, sent, "error")
    assert (found.max_tokens, found.seed, found.n, found.stop_token_ids, found.user) == (3, 7, 1, [4], "3.0")
    assert found.temperature == 0.5 and repr(found.max_tokens) == "3"


@pytest.mark.parametrize(
    ("rest", "param"),
    [
        ('"seed":1.5', "seed"),
        ('"temperature":1e999', "temperature"),
        ('"seed":"7.0"', "seed"),
        ('"n":-2.0', "n"),
        ('"seed":1e300', "seed"),
        ('"what":3.0', "what"),
    ],
)
def test_what_is_wrong_beside_them_is_refused_as_ever(rest: str, param: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(CompletionBody, f'{{"prompt":"x","max_tokens":3.0,{rest}}}'.encode(), "error")
    assert refused.value.param == param
