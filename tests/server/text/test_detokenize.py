"""Text that arrives in pieces adds up to the text decoded at once, and stop strings cut it at the same place."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from slipstream.server.text import IncrementalDetokenizer, StopChecker, Tokenizer, load_tokenizer
from slipstream.server.text.tokenizer_files import TokenizerParts

many = settings(max_examples=200)


def tokenizer_of(backend: Backend) -> Tokenizer:
    return Tokenizer(TokenizerParts(backend, {}, (), {}))


def streamed(tokenizer: Tokenizer, chunks: list[list[int]], skip: bool, prompt: list[int] | None = None) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, skip, prompt or [])
    return "".join([detokenizer.push(chunk) for chunk in chunks]) + detokenizer.finish()


def assert_same_text(tokenizer: Tokenizer, chunks: list[list[int]]) -> None:
    token_ids = [token for chunk in chunks for token in chunk]
    for skip in (True, False):
        assert streamed(tokenizer, chunks, skip) == tokenizer.decode(token_ids, skip_special_tokens=skip)


def chunks_of(token_ids: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(token_ids, max_size=4), max_size=25)


@many
@given(data=st.data())
def test_byte_level(default_tokenizer: Tokenizer, data: st.DataObject) -> None:
    pieces = default_tokenizer.encode("a é 你好 👩‍👩‍👧 ")  # parts of characters
    pieces += [0, 1, 2]  # special tokens
    some = st.sampled_from(pieces) | st.integers(0, 300) | st.integers(0, 49151) | st.integers(49152, 60000)
    assert_same_text(default_tokenizer, data.draw(chunks_of(some)))


@many
@given(text=st.text(max_size=60), seed=st.integers(0, 1000))
def test_byte_level_of_any_text(default_tokenizer: Tokenizer, text: str, seed: int) -> None:
    split = random.Random(seed)
    token_ids = default_tokenizer.encode(text)
    chunks: list[list[int]] = [[]]
    for token in token_ids:
        if split.random() < 0.7:
            chunks.append([])
        chunks[-1].append(token)
    assert_same_text(default_tokenizer, chunks)


def test_added_tokens_outside_the_byte_alphabet(default_tokenizer: Tokenizer, tmp_path: Path) -> None:
    backend = Backend(models.BPE(vocab={"a": 0, "Ġ": 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(["<你>", "two words", "<thé>", "\u00a0x"])
    backend.add_special_tokens(["<|é|>"])
    assert_same_text(tokenizer_of(backend), [[0, 2], [1], [3, 4], [5], [6], [0]])


@pytest.fixture(scope="session")
def sentencepiece(
    sentencepiece_vocab: list[tuple[str, float, int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, Tokenizer]:
    """With and without a space before the first word."""
    made = {}
    for prefix_space in (True, False):
        vocab = {piece: i for i, (piece, _, _) in enumerate(sentencepiece_vocab)}
        backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
        backend.add_special_tokens(["<s>", "</s>"])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix_space else steps)
        made[prefix_space] = tokenizer_of(backend)
    return made


@many
@given(data=st.data(), prefix_space=st.booleans())
def test_sentencepiece(sentencepiece: dict[bool, Tokenizer], data: st.DataObject, prefix_space: bool) -> None:
    tokenizer = sentencepiece[prefix_space]
    character = [3 + byte for byte in "你é😀".encode()]
    space = tokenizer.token_id("▁")
    assert space is not None
    some = st.sampled_from([0, 1, 2, space, space, *character, 3 + 0x41]) | st.integers(0, tokenizer.vocab_size + 5)
    assert_same_text(tokenizer, data.draw(chunks_of(some)))


@many
@given(data=st.data(), prefix_space=st.booleans())
def test_sentencepiece_after_a_prompt(
    sentencepiece: dict[bool, Tokenizer], data: st.DataObject, prefix_space: bool
) -> None:
    """The answer is what it adds to the prompt's text: the space before its first word is not lost."""
    tokenizer = sentencepiece[prefix_space]
    character = [3 + byte for byte in "你".encode()]
    space = tokenizer.token_id("▁")
    assert space is not None
    some = st.sampled_from([1, 2, space, 3 + 0x41]) | st.integers(0, tokenizer.vocab_size - 1)
    prompt = data.draw(st.lists(some.filter(lambda token: token not in tokenizer.byte_fallback_ids), max_size=5))
    prompt += data.draw(st.sampled_from([[], character, [3 + 0x41]]))  # whole characters
    chunks = data.draw(chunks_of(some))
    answer = [token for chunk in chunks for token in chunk]
    if prompt and prompt[-1] in tokenizer.byte_fallback_ids:  # a run of bytes that goes on is another matter
        answer, chunks = [space, *answer], [[space], *chunks]
    for skip in (True, False):
        before = tokenizer.decode(prompt, skip_special_tokens=skip)
        assert before + streamed(tokenizer, chunks, skip, prompt) == tokenizer.decode(prompt + answer, skip)


def test_the_space_after_a_prompt(write_sentencepiece: Any) -> None:
    tokenizer = load_tokenizer(write_sentencepiece())
    prompt, answer = tokenizer.encode("The capital of France is"), tokenizer.encode("Paris", add_special_tokens=False)
    assert streamed(tokenizer, [answer], True, prompt) == " Paris"
    assert streamed(tokenizer, [[token] for token in answer], True, prompt) == " Paris"
    assert streamed(tokenizer, [answer], True, [1]) == "Paris"  # nothing is seen of the prompt
    assert streamed(tokenizer, [answer], False, [1]) == " Paris"
    assert streamed(tokenizer, [[3 + 0xA0]], True, [*prompt, 3 + 0xE4, 3 + 0xBD]) == "\ufffd"


OTHER_DECODERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "metaspace": lambda: decoders.Metaspace(),
    "wordpiece": lambda: decoders.WordPiece(),
    "bpe": lambda: decoders.BPEDecoder(suffix="</w>"),
}


@pytest.mark.parametrize("kind", list(OTHER_DECODERS))
@many
@given(chunks=chunks_of(st.integers(0, 12)))
def test_other_decoders(kind: str, chunks: list[list[int]]) -> None:
    words = ["▁one", "two", "##s", "▁", "a</w>", ".", "n't", "▁▁x", "##", "é", " "]
    backend = Backend(models.WordLevel(vocab={word: i for i, word in enumerate(words)}, unk_token="two"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if OTHER_DECODERS[kind]() is not None:
        backend.decoder = OTHER_DECODERS[kind]()
    backend.add_special_tokens(["<end>"])
    tokenizer = tokenizer_of(backend)
    assert_same_text(tokenizer, chunks)
    prompt = [token for chunk in chunks[: len(chunks) // 2] for token in chunk]
    answer = chunks[len(chunks) // 2 :]
    for skip in (True, False):
        whole = tokenizer.decode([token for chunk in chunks for token in chunk], skip)
        assert streamed(tokenizer, answer, skip, prompt) == whole[len(tokenizer.decode(prompt, skip)) :]


def test_text_comes_as_soon_as_it_is_certain(default_tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(default_tokenizer)
    token_ids = default_tokenizer.encode("Hi 你!")
    assert [detokenizer.push([token]) for token in token_ids] == ["Hi", " ", "", "你", "!"]
    assert detokenizer.finish() == ""
    assert detokenizer.push(token_ids[2:3]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_sentencepiece_text_comes_with_its_token(write_sentencepiece: Any) -> None:
    tokenizer = load_tokenizer(write_sentencepiece())
    detokenizer = IncrementalDetokenizer(tokenizer)
    token_ids = tokenizer.encode("so it is\x01", add_special_tokens=False)
    pushed = [detokenizer.push([token]) for token in token_ids]
    assert "".join(pushed) == "so it is"
    assert all(pushed[:-1])
    assert detokenizer.finish() == "\x01"  # held back, for more bytes could have made it something else


def naive_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: read character by character until the text ends in a stop string, the longest if several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@many
@given(
    chunks=st.lists(st.text("ab\n", max_size=4), max_size=15),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
def test_stops_like_the_definition(chunks: list[str], stops: list[str], include: bool) -> None:
    checker = StopChecker(stops, include)
    passed = []
    for chunk in chunks:
        passed.append(checker.push(chunk))
        if checker.matched is None:  # nothing is passed on that a stop string could still take back, and no less
            arrived, out = "".join(chunks[: checker.chunks]), "".join(passed)
            held = arrived.removeprefix(out)
            assert arrived.startswith(out)
            assert not held or any(stop.startswith(held) for stop in stops)
    text, stop = naive_stop("".join(chunks), stops, include)
    assert "".join(passed) + checker.finish() == text
    assert checker.matched == stop
    if stop is None:
        assert checker.chunks == len(chunks)
    else:
        assert naive_stop("".join(chunks[: checker.chunks]), stops, include)[1] == stop
        assert naive_stop("".join(chunks[: checker.chunks - 1]), stops, include)[1] is None


def test_stop_checker_refuses_the_empty_string() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopChecker(["a", ""])
