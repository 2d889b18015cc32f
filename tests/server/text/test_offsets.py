"""Offsets of tokens are characters of the text, whatever the tokens are cut from."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from slipstream.server.text import (
    IncrementalDetokenizer,
    OffsetDetokenizer,
    Tokenizer,
    load_tokenizer,
    prompt_offsets,
)


def offsets_of(tokenizer: Tokenizer, tokens: list[int], skip: bool, cuts: int = 1) -> tuple[str, list[int]]:
    detokenizer = OffsetDetokenizer(IncrementalDetokenizer(tokenizer, skip))
    text, offsets = "", []
    for start in range(0, len(tokens), cuts):
        text += detokenizer.push(tokens[start : start + cuts])
        offsets += detokenizer.take()
    return text + detokenizer.finish(), offsets


def starts_of_characters(data: bytes) -> list[int]:
    """For each character of the text, with U+FFFD for what is none, the position of its first byte; and the end."""
    starts, position = [], 0
    while position < len(data):
        try:
            valid, bad = data[position:].decode(), 0
        except UnicodeDecodeError as error:
            valid, bad = data[position : position + error.start].decode(), error.end - error.start
        for character in valid:
            starts.append(position)
            position += len(character.encode())
        if bad:
            starts.append(position)
            position += bad
    return [*starts, len(data)]


@given(data=st.data(), skip=st.booleans(), cuts=st.integers(1, 4))
def test_byte_level(default_tokenizer: Tokenizer, data: st.DataObject, skip: bool, cuts: int) -> None:
    pieces = [*default_tokenizer.encode("a é 你好 👩‍👩‍👧 🦜ﬀ "), 0, 1, 2]  # parts of characters, special tokens
    some = st.sampled_from(pieces) | st.integers(0, 300) | st.integers(0, 49151) | st.integers(49152, 60000)
    tokens = data.draw(st.lists(some, max_size=30))
    table = default_tokenizer.byte_table(skip)
    assert table is not None
    parts = [table[token] if token < len(table) else b"" for token in tokens]
    whole = b"".join(parts)
    assume("\ufffd".encode() not in whole)
    text, offsets = offsets_of(default_tokenizer, tokens, skip, cuts)
    assert text == whole.decode("utf-8", "replace")
    starts = starts_of_characters(whole)
    begin = 0
    for part, offset in zip(parts, offsets, strict=True):
        if part:
            assert starts[offset] <= begin < starts[offset + 1]
        assert 0 <= offset <= len(text)
        begin += len(part)
    assert offsets == sorted(offsets)


@given(text=st.text(max_size=40).filter(lambda text: "\ufffd" not in text), bos=st.booleans())
def test_prompt_as_it_was_sent(default_tokenizer: Tokenizer, text: str, bos: bool) -> None:
    text += "<|im_end|>" + text
    tokens = default_tokenizer.encode(text, add_special_tokens=False)
    offsets = prompt_offsets(default_tokenizer, [1] * bos + tokens, text)[bos:]
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)
    assume(default_tokenizer.decode(tokens, skip_special_tokens=False) == text)  # there are bytes it has no token for
    begin = 0
    for token, offset in zip(tokens, offsets, strict=True):
        data = default_tokenizer.token_bytes(token)
        assert len(text[:offset].encode()) <= begin < len(text[: offset + 1].encode())
        begin += len(data)
    assert begin == len(text.encode())


@pytest.fixture
def sentencepiece(write_sentencepiece: Any) -> Tokenizer:
    """With byte fallback."""
    return load_tokenizer(write_sentencepiece())


@given(data=st.data(), skip=st.booleans())
def test_sentencepiece(sentencepiece: Tokenizer, data: st.DataObject, skip: bool) -> None:
    # Whole runs of bytes that are characters, between tokens that are none.
    byte_of = {byte: token for token, byte in sentencepiece.byte_fallback_ids.items()}
    words = st.integers(0, sentencepiece.vocab_size + 3).filter(
        lambda token: token not in sentencepiece.byte_fallback_ids
    )
    runs = st.text("aé你😀", min_size=1, max_size=3).map(lambda text: [byte_of[byte] for byte in text.encode()])
    groups = data.draw(st.lists(runs | words.map(lambda token: [token]), max_size=12))
    tokens = [token for group in groups for token in group]
    text, offsets = offsets_of(sentencepiece, tokens, skip)
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)
    pending = b""
    for token, offset in zip(tokens, offsets, strict=True):
        byte = sentencepiece.byte_fallback_ids.get(token)
        if byte is not None:
            pending += bytes([byte])
            try:
                shown = pending.decode()
            except UnicodeDecodeError:
                continue
            pending = b""
            assert text[offset] == shown
        elif token < sentencepiece.vocab_size and not (skip and token in sentencepiece.special_ids):
            assert text[offset:].startswith(sentencepiece.token_text(token).removeprefix("" if offset else " "))


@given(data=st.data())
def test_bytes_that_are_no_characters(sentencepiece: Tokenizer, data: st.DataObject) -> None:
    some = st.sampled_from(sorted(sentencepiece.byte_fallback_ids)) | st.integers(0, sentencepiece.vocab_size - 1)
    text, offsets = offsets_of(sentencepiece, data.draw(st.lists(some, max_size=20)), skip=True)
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)


def test_emoji_and_cjk(default_tokenizer: Tokenizer) -> None:
    text = "Hi 🦜你好!"
    tokens = default_tokenizer.encode(text)
    assert len(tokens) > len(text)
    offsets = prompt_offsets(default_tokenizer, tokens, text)
    assert offsets[-1] == len(text) - 1
    assert len(offsets) == len(tokens)
