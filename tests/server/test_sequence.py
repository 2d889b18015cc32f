"""A sequence's output does not depend on how the engine's deltas cut its tokens, as they will with speculation."""

from __future__ import annotations

import asyncio
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from slipstream.engine.handle import RequestStream
from slipstream.engine.messages import NewRequest, SamplingParams, TokenDelta, TokenLogprobs
from slipstream.server.errors import GenerationFailedError, UnavailableError
from slipstream.server.generation import OutputOptions, Piece, Sequence
from slipstream.server.rollout.versions import Called
from slipstream.server.telemetry.metrics import Metrics
from slipstream.server.text import Tokenizer, load_tokenizer
from slipstream.server.text.tokenizer_files import TokenizerParts

TEXT = "Ein Satz, noch ein Satz 🦜🎉 und STOP, dann das Ende.\nSTOP"
stops = st.lists(st.sampled_from(["STOP", "Satz", "z 🦜", "ST", "Ende.\n", "nie", "tz,"]), max_size=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("default")


class Aborts(list[int]):
    """Stands for the engine client, of which a stream needs only this."""

    def abort(self, request_ids: list[int], stopped: bool = False) -> None:
        self.extend(request_ids)


def make(
    tokenizer: Tokenizer, output: OutputOptions, prompt: tuple[int, ...] = (1,)
) -> tuple[Sequence, RequestStream, Aborts]:
    text = SimpleNamespace(tokenizer=tokenizer)
    control = SimpleNamespace(called=cache(lambda number: Called(f"v{number}")), weight_version="now")
    service: Any = SimpleNamespace(metrics=Metrics("m"), text=text, engine_gone=UnavailableError, control=control)
    service.config = SimpleNamespace(stream_interval=1)
    request = NewRequest(request_id=1, prompt=list(prompt), params=SamplingParams(max_tokens=100))
    sequence, aborts = Sequence(0, request, output, service), Aborts()
    client: Any = aborts
    stream = RequestStream(client, 1)
    sequence.attach(stream)
    return sequence, stream, aborts


def deltas(tokens: list[int], cuts: list[int], **last: Any) -> list[TokenDelta]:
    """The tokens cut into deltas of these lengths, over and over."""
    found = []
    start = 0
    while start < len(tokens):
        size = cuts[len(found) % len(cuts)]
        part = tokens[start : start + size]
        start += size
        logprobs = [TokenLogprobs(token, -1.0, 1) for token in part]
        found.append(TokenDelta(request_id=1, tokens=part, logprobs=logprobs))
    ending = {"finish_reason": "length"} | last
    return [*found[:-1], TokenDelta(request_id=1, tokens=found[-1].tokens, logprobs=found[-1].logprobs, **ending)]


async def run(sequence: Sequence, stream: RequestStream, arriving: list[TokenDelta]) -> list[Piece]:
    pieces = []
    for delta in arriving:
        stream.put(delta)
        if not sequence.finished:
            pieces.append(await sequence.next())
    return pieces


@given(
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    stop=stops,
    include=st.booleans(),
    min_tokens=st.integers(0, 12),
)
async def test_cuts_do_not_matter(
    tokenizer: Tokenizer, cuts: list[int], stop: list[str], include: bool, min_tokens: int
) -> None:
    tokens = tokenizer.encode(TEXT)
    output = OutputOptions(stop=tuple(stop), include_stop=include, min_tokens=min_tokens)
    one_by_one, stream, _ = make(tokenizer, output)
    expected = await run(one_by_one, stream, deltas(tokens, [1]))
    sequence, stream, aborts = make(tokenizer, output)
    pieces = await run(sequence, stream, deltas(tokens, cuts))

    assert "".join(piece.text for piece in pieces) == "".join(piece.text for piece in expected)
    kept = [token for piece in pieces for token in piece.tokens]
    assert kept == [token for piece in expected for token in piece.tokens] == tokens[: len(kept)]
    assert [entry.token for piece in pieces for entry in piece.logprobs] == kept
    assert sequence.num_tokens == len(kept)
    ends = [(piece.finish_reason, piece.stop_reason) for piece in pieces if piece.finish_reason]
    assert ends == [(expected[-1].finish_reason, expected[-1].stop_reason)]
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)

    # The same through the way without streaming.
    whole, stream, _ = make(tokenizer, output)
    for delta in deltas(tokens, cuts):
        stream.put(delta)
    answer = await whole.rest()
    assert answer.text == "".join(piece.text for piece in expected)
    assert (answer.tokens, answer.finish_reason, answer.stop_reason) == (kept, *ends[0])
    # The text is what a plain search in the whole text gives.
    if not min_tokens:
        found = [(TEXT.index(text) + len(text), -len(text), text) for text in stop if text in TEXT]
        if found:
            end, width, text = min(found)
            assert (ends[0], answer.text) == (("stop", text), TEXT[: end if include else end + width])
            assert aborts in ([], [1])
        else:
            assert (ends[0], answer.text) == (("length", None), TEXT)


@given(cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4), stop=stops, interval=st.integers(2, 20))
async def test_pieces_of_an_interval_say_the_same(
    tokenizer: Tokenizer, cuts: list[int], stop: list[str], interval: int
) -> None:
    tokens = tokenizer.encode(TEXT)
    whole, stream, _ = make(tokenizer, OutputOptions(stop=tuple(stop)))
    for delta in deltas(tokens, cuts):
        stream.put(delta)
    expected = await whole.rest()
    sequence, stream, _ = make(tokenizer, OutputOptions(stop=tuple(stop), interval=interval))
    pieces: list[Piece] = []

    async def read() -> None:
        while not sequence.finished:
            pieces.append(await sequence.next())

    reading = asyncio.create_task(read())
    for delta in deltas(tokens, cuts):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        stream.put(delta)
    await reading
    assert len(pieces[0].tokens) == cuts[0] or sequence.finished, "the first comes at once"
    assert all(interval <= len(piece.tokens) < interval + max(cuts) for piece in pieces[1:-1])
    assert "".join(piece.text for piece in pieces) == expected.text
    assert [token for piece in pieces for token in piece.tokens] == expected.tokens
    assert [entry.token for piece in pieces for entry in piece.logprobs] == expected.tokens
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == (expected.finish_reason, expected.stop_reason)


async def test_tokens_are_counted_when_they_arrive_whenever_they_are_read(tokenizer: Tokenizer) -> None:
    """As what the weights are called then, too; of a whole answer all is read at its end."""
    sequence, stream, _ = make(tokenizer, OutputOptions())
    reading = asyncio.create_task(sequence.rest())
    await asyncio.sleep(0)
    for number, name in enumerate(("old", "new", "newer")):
        called = Called(name)
        sequence._service.control.called = lambda _, called=called: called  # type: ignore[misc]
        stream.put(TokenDelta(request_id=1, tokens=[5, 6], target_version=number))
        await asyncio.sleep(0)
        assert not reading.done() and told(sequence, "inter_token_latency_seconds")[0] == 2 * number
    stream.put(TokenDelta(request_id=1, tokens=[], finish_reason="length", target_version=2))
    assert (await reading).tokens == [5, 6] * 3
    assert sequence.weight_spans == [(0, "old"), (2, "new"), (4, "newer")]


@pytest.mark.parametrize("include", [False, True])
async def test_stop_token(tokenizer: Tokenizer, include: bool) -> None:
    tokens = tokenizer.encode("one two three")
    for asked, reason in ((frozenset({tokens[-1]}), tokens[-1]), (frozenset(), None)):
        output = OutputOptions(include_stop=include, stop_token_ids=asked)
        sequence, stream, _ = make(tokenizer, output)
        pieces = await run(sequence, stream, deltas(tokens, [2], finish_reason="stop", stop_token=tokens[-1]))
        assert "".join(piece.text for piece in pieces) == ("one two three" if include else "one two")
        assert pieces[-1].stop_reason == reason
        assert sequence.num_tokens == len(tokens)


@given(
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    stop=stops,
    include=st.booleans(),
    stop_token=st.booleans(),
)
async def test_offsets_lead_to_the_tokens(
    tokenizer: Tokenizer, cuts: list[int], stop: list[str], include: bool, stop_token: bool
) -> None:
    tokens = tokenizer.encode(TEXT)
    output = OutputOptions(stop=tuple(stop), include_stop=include, offsets=True)
    ending: dict[str, Any] = {"finish_reason": "stop", "stop_token": tokens[-1]} if stop_token else {}
    whole, stream, _ = make(tokenizer, output)
    streaming, other, _ = make(tokenizer, output)
    for delta in deltas(tokens, cuts, **ending):
        stream.put(delta)
    answer = await whole.rest()
    pieces = await run(streaming, other, deltas(tokens, cuts, **ending))
    assert len(answer.offsets) == len(answer.tokens)
    assert answer.offsets == sorted(answer.offsets)
    begin = 0
    for token, offset in zip(answer.tokens, answer.offsets, strict=True):
        if offset < len(answer.text):
            assert len(answer.text[:offset].encode()) <= begin < len(answer.text[: offset + 1].encode())
        else:  # cut off
            assert offset == len(answer.text) <= len(TEXT.encode()[:begin].decode(errors="ignore"))
        begin += len(tokenizer.token_bytes(token))
    streamed = [offset for piece in pieces for offset in piece.offsets]
    assert [min(offset, len(answer.text)) for offset in streamed] == answer.offsets


async def test_what_a_stop_string_ends_is_counted_like_the_rest(tokenizer: Tokenizer) -> None:
    """The engine's last delta comes when nobody reads any more, and alone knows of preemptions."""
    sequence, stream, aborts = make(tokenizer, OutputOptions(stop=("STOP",)))
    stream.put(TokenDelta(request_id=1, tokens=tokenizer.encode("a STOP"), scheduled_at=2.0, num_cached_tokens=1))
    await sequence.next()
    assert sequence.finished and aborts == [1]
    ending = {"scheduled_at": 2.0, "num_cached_tokens": 1, "num_preemptions": 3}
    stream.put(TokenDelta(request_id=1, tokens=[], finish_reason="abort", **ending))
    assert told(sequence, "request_num_preemptions") == (1, 3)
    assert told(sequence, "request_queue_time_seconds") == (1, 2)
    assert told(sequence, "request_prefill_kv_computed_tokens") == (1, 0)
    assert told(sequence, "e2e_request_latency_seconds")[0] == 1


async def test_what_was_never_scheduled_has_no_time_in_the_queue(tokenizer: Tokenizer) -> None:
    sequence, stream, _ = make(tokenizer, OutputOptions())
    sequence.end()
    stream.put(TokenDelta(request_id=1, tokens=[], finish_reason="abort"))
    assert told(sequence, "request_num_preemptions") == (1, 0)
    assert told(sequence, "request_queue_time_seconds") == (0, 0)
    assert told(sequence, "request_prefill_kv_computed_tokens") == (1, 0)


async def test_what_is_ended_while_its_prompt_is_computed_was_in_the_queue(tokenizer: Tokenizer) -> None:
    sequence, stream, _ = make(tokenizer, OutputOptions())
    sequence.end()
    stream.put(TokenDelta(request_id=1, tokens=[], finish_reason="abort", scheduled_at=2.0))
    assert told(sequence, "request_queue_time_seconds") == (1, 2)
    assert told(sequence, "request_prefill_kv_computed_tokens") == (1, 1)


def told(sequence: Sequence, name: str) -> tuple[float, float]:
    """Count and sum of a histogram."""
    registry = sequence._service.metrics.registry
    labels = {"model_name": "m"}
    count, total = (registry.get_sample_value(f"slipstream:{name}_{kind}", labels) for kind in ("count", "sum"))
    assert count is not None and total is not None
    return count, total


async def test_an_error_of_the_engine_is_one_of_the_request(tokenizer: Tokenizer) -> None:
    sequence, stream, _ = make(tokenizer, OutputOptions())
    stream.put(TokenDelta(request_id=1, tokens=[], finish_reason="error", error="out of luck"))
    with pytest.raises(GenerationFailedError, match="out of luck"):
        await sequence.next()
    assert sequence.finished


async def test_an_abort_is_a_failure_only_where_the_engine_has_ended(tokenizer: Tokenizer) -> None:
    sequence, stream, _ = make(tokenizer, OutputOptions())
    [piece] = await run(sequence, stream, deltas(tokenizer.encode("half"), [9], finish_reason="abort"))
    assert (piece.text, piece.finish_reason) == ("half", "abort")
    sequence, stream, _ = make(tokenizer, OutputOptions())
    stream.lost = True
    stream.put(TokenDelta(request_id=1, tokens=[], finish_reason="abort", error="killed"))
    with pytest.raises(UnavailableError, match="killed"):
        await sequence.next()
    assert sequence.finished


async def test_end_stops_the_engine_once(tokenizer: Tokenizer) -> None:
    sequence, stream, aborts = make(tokenizer, OutputOptions())
    stream.put(TokenDelta(request_id=1, tokens=[5]))
    await sequence.next()
    sequence.end()
    sequence.end()
    assert aborts == [1]


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    words = ["<s>", "▁The", "▁is", "▁Paris", ".", "▁"]
    backend = Backend(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(TokenizerParts(backend, {}, (), {}))


@given(cuts=st.lists(st.integers(1, 3), min_size=1, max_size=3))
@pytest.mark.parametrize(
    ("output", "text", "reason"),
    [
        (OutputOptions(), " Paris. Paris", None),
        (OutputOptions(stop=(" Paris",)), "", " Paris"),
        (OutputOptions(stop=(". P",)), " Paris", ". P"),
        (OutputOptions(end_texts=(". P",)), " Paris", None),
        (OutputOptions(offsets=True), " Paris. Paris", None),
    ],
)
async def test_the_space_after_the_prompt(
    sentencepiece: Tokenizer, output: OutputOptions, text: str, reason: str | None, cuts: list[int]
) -> None:
    sequence, stream, _ = make(sentencepiece, output, prompt=(0, 1, 2))
    pieces = await run(sequence, stream, deltas([3, 4, 3], cuts))
    assert "".join(piece.text for piece in pieces) == text
    assert pieces[-1].stop_reason == reason
    assert pieces[-1].finish_reason == ("length" if text == " Paris. Paris" else "stop")
    if output.offsets:
        assert [offset for piece in pieces for offset in piece.offsets] == [0, 6, 7]


@given(
    versions=st.lists(st.sampled_from([3, 3, 3, 4, 7]), min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    slow=st.booleans(),
    stop=stops,
)
async def test_every_token_says_which_weights_sampled_it(
    tokenizer: Tokenizer, versions: list[int], cuts: list[int], slow: bool, stop: list[str]
) -> None:
    """However deltas are cut, and however slowly they are read: then they are merged."""
    tokens = tokenizer.encode(TEXT * 2, add_special_tokens=False)[: len(versions)]
    versions = versions[: len(tokens)]
    sequence, stream, _ = make(tokenizer, OutputOptions(stop=tuple(stop)))
    arriving: list[TokenDelta] = []
    for token, version in zip(tokens, versions, strict=True):
        size = cuts[len(arriving) % len(cuts)]
        last = arriving[-1] if arriving else None
        if last is not None and last.target_version == version and len(last.tokens) < size:
            arriving[-1] = TokenDelta(request_id=1, tokens=[*last.tokens, token], target_version=version)
        else:
            arriving.append(TokenDelta(request_id=1, tokens=[token], target_version=version))
    # Aborted: the end has no tokens, and the version that serves then.
    end = TokenDelta(request_id=1, tokens=[], finish_reason="abort", target_version=9)
    if slow:
        for _ in range(70):  # more than may wait
            stream.put(TokenDelta(request_id=1, tokens=[], target_version=arriving[0].target_version))
        for delta in [*arriving, end]:
            stream.put(delta)
        while not sequence.finished:
            await sequence.next()
    else:
        await run(sequence, stream, [*arriving, end])
    spans = sequence.weight_spans
    borders = [*(span.first for span in spans[1:]), sequence.num_tokens]
    told = [span.version for span, border in zip(spans, borders, strict=True) for _ in range(span.first, border)]
    assert told == [f"v{version}" for version in versions[: sequence.num_tokens]]
    assert all(before.version != after.version for before, after in pairwise(spans))
    assert sequence.weight_version == (told[-1] if told else "now")
