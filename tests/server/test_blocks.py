"""Blocks of an answer do not depend on how its text is cut."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from slipstream.server.tools.answer import Speech
from slipstream.server.tools.blocks import Blocks

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "<b>"}}\n</tool_call>'
PARTS = ["<think>", "</think>", "Hmm.", "Hello ", CALL, '<tool_call>{"name": "g"}', "\n", "<tool", ""]
SPEECHES = [
    None,
    Speech(reasoning="think"),
    Speech(tool_format="hermes", tool_names=("f",)),
    Speech(tool_format="hermes", tool_names=("f",), reasoning="think", is_open=True),
]


@given(st.lists(st.sampled_from(PARTS), max_size=8), st.sampled_from(SPEECHES), st.lists(st.integers(0, 200)))
def test_cuts_do_not_matter(parts: list[str], speech: Speech | None, cuts: list[int]) -> None:
    text = "".join(parts)
    whole = Blocks(speech)
    whole.push(text, True)
    pieces = Blocks(speech)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    texts = [text[begin:end] for begin, end in itertools.pairwise(places)] or [text]
    events = [event for at, piece in enumerate(texts) for event in pieces.push(piece, at == len(texts) - 1)]

    def seen(blocks: Blocks) -> list[tuple[str, str, str]]:
        return [(block.kind, block.name, block.text) for block in blocks.blocks]

    assert seen(pieces) == seen(whole)
    if speech is None:
        assert "".join(block.text for block in whole.blocks) == text
    open_block = None
    for event in events:
        if event.kind == "begin":
            assert open_block is None and event.block.index == pieces.blocks.index(event.block)
            open_block = event.block
        assert event.block is open_block
        if event.kind == "end":
            open_block = None
    assert open_block is None
    for block in pieces.blocks:
        told = "".join(event.text for event in events if event.kind == "more" and event.block is block)
        assert told == block.text
