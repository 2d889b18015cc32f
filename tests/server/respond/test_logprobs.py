"""Log-probabilities of answers of /v1/responses: those of chat, and of the text only."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import openai
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.messages import TokenLogprobs
from slipstream.server.generation import Piece
from slipstream.server.respond.schema import RespondBody
from slipstream.server.respond.writer import ResponseWriter
from slipstream.server.text import IncrementalDetokenizer, OffsetDetokenizer, load_tokenizer
from slipstream.server.tools.answer import Speech
from tests.server.respond.asked import QUESTION

INCLUDE: Any = ["message.output_text.logprobs"]
TOKENIZER = load_tokenizer("default")


def test_they_are_those_of_chat_and_a_stream_adds_up_to_them(server: Any) -> None:
    asked: Any = {"model": "tiny-model", "temperature": 0}
    chat = server.chat(
        messages=[{"role": "user", "content": QUESTION}], max_tokens=8, logprobs=True, top_logprobs=3, **asked
    )
    expected = chat["choices"][0]["logprobs"]["content"]
    asked |= {"input": QUESTION, "max_output_tokens": 8, "include": INCLUDE, "top_logprobs": 3}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        whole = client.responses.create(**asked)
        part: Any = whole.output[0].content[0]  # type: ignore[union-attr, index]
        assert [each.model_dump() for each in part.logprobs] == expected and len(expected) == 8
        assert whole.top_logprobs == 3 and len(part.logprobs[0].top_logprobs) == 3
        with client.responses.create(**asked, stream=True) as stream:
            events: list[Any] = list(stream)
        deltas = [each.to_dict() for event in events if event.type.endswith("text.delta") for each in event.logprobs]
        [done] = [event for event in events if event.type.endswith("text.done")]
        assert deltas == [each.to_dict() for each in done.logprobs] == expected
        assert [each.model_dump() for each in events[-1].response.output[0].content[0].logprobs] == expected

        again = client.responses.create(model="tiny-model", input=QUESTION, previous_response_id=whole.id)
        assert again.usage is not None and again.usage.input_tokens > 8
        assert again.output[0].content[0].logprobs == []  # type: ignore[union-attr, index]


def test_a_number_of_alternatives_asks_for_them_too(server: Any) -> None:
    body = {"input": QUESTION, "max_output_tokens": 2, "top_logprobs": 1}
    status, found = server.post("/v1/responses", body)
    [first, *_] = found["output"][0]["content"][0]["logprobs"]
    assert status == 200 and len(first["top_logprobs"]) == 1
    status, found = server.post("/v1/responses", body | {"top_logprobs": 5000})
    assert status == 400 and found["error"]["param"] == "top_logprobs" and "--max-logprobs" in found["error"]["message"]


ANSWERS = [
    ("<think>Hm, 1 < 2.</think>\n\nRome it is: 3 < 4, <b>!", "Rome it is: 3 < 4, <b>!"),
    ("<think>Hm.</think>Naïve 🙂 ok", "Naïve 🙂 ok"),
    ("Nothing to think of", "Nothing to think of"),
    ("<think>Never ends", None),
    ("", None),
]


@given(st.sampled_from(ANSWERS), st.lists(st.integers(1, 6), min_size=1, max_size=30), st.integers(0, 6))
def test_they_belong_to_the_text_however_it_is_cut(answer: tuple[str, str | None], sizes: list[int], lag: int) -> None:
    """``lag``: characters that are held back, as where a stop string may begin."""
    text, told_text = answer
    tokens = [*TOKENIZER.encode(text, add_special_tokens=False), TOKENIZER.eos_token_ids[0]]
    entries = [TokenLogprobs(token, -float(index), 1) for index, token in enumerate(tokens)]
    pieces = cut(text, tokens, entries, sizes, lag)
    generation: Any = SimpleNamespace(name="resp_1", count_tokens=lambda: (1, 0, len(tokens)))
    asked = RespondBody(input="x", include=INCLUDE)
    speech = Speech(reasoning="think")
    writers = [ResponseWriter(generation, asked, "model", speech, TOKENIZER, lambda response: None, 0) for _ in "ab"]
    told = b"".join(writers[0].chunk(generation, piece) for piece in pieces) + writers[0].end()
    events = [json.loads(each.partition(b"data: ")[2]) for each in told.split(b"\n\n")[:-1]]
    whole = Piece(text, tokens, entries, True, "stop", offsets=[at for piece in pieces for at in piece.offsets])
    body = json.loads(writers[1].body([whole]))
    [streamed, at_once] = [
        [item["content"][0] for item in response["output"] if item["type"] == "message"]
        for response in (events[-1]["response"], body)
    ]
    assert streamed == at_once
    assert [part["text"] for part in streamed] == ([] if told_text is None else [told_text])
    for part in streamed:
        found = b"".join(bytes(each["bytes"]) for each in part["logprobs"])
        assert found.decode() == part["text"] or found.decode().lstrip() == part["text"]
        deltas = [each for event in events if event["type"].endswith("output_text.delta") for each in event["logprobs"]]
        assert deltas == part["logprobs"]


def cut(text: str, tokens: list[int], entries: list[TokenLogprobs], sizes: list[int], lag: int) -> list[Piece]:
    """What a sequence tells of an answer in so many tokens at a time."""
    detokenizer = OffsetDetokenizer(IncrementalDetokenizer(TOKENIZER))
    pieces: list[Piece] = []
    begin, seen, shown = 0, "", 0
    while not pieces or begin < len(tokens):
        size = sizes[len(pieces) % len(sizes)]
        new, is_last = tokens[begin : begin + size], begin + size >= len(tokens)
        seen += detokenizer.push(new) + (detokenizer.finish() if is_last else "")
        end = len(seen) if is_last else max(shown, len(seen) - lag)
        piece = Piece(seen[shown:end], new, entries[begin : begin + size], begin == 0, "stop" if is_last else None)
        piece.offsets = detokenizer.take()
        pieces.append(piece)
        begin, shown = begin + size, end
    assert seen == text
    return pieces
