"""Prompts that are too long, made shorter where a request asks for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slipstream.server.openai.fields import ALL_THAT_FIT, Side

if TYPE_CHECKING:
    from slipstream.server.preparing.prepared import Limits
    from slipstream.server.preparing.text_model import TextModel

ANSWER_SHARE = 8
"""The context by the room that a prompt leaves for an answer whose length is not said."""


def cut(prompt: list[int], most: int, side: Side | None, kept: int = 0) -> list[int]:
    """At most so many tokens of it: the first ones if what is on the right goes, else the first ``kept`` ones, and as
    many of the last as there is room for."""
    if len(prompt) <= most or side == "right":
        return prompt[:most]
    kept = kept if kept < most else 0
    return prompt[:kept] + prompt[len(prompt) - (most - kept) :]


def most_tokens(limits: Limits, asked: int | None, answer: int | None) -> int | None:
    """How many tokens of a prompt are used where truncate_prompt_tokens is ``asked``; None: all.

    ``answer``: how many tokens are to follow, as the request says.
    """
    return room_beside(limits, answer) if asked == ALL_THAT_FIT else asked


def room_beside(limits: Limits, answer: int | None) -> int:
    """Tokens of a prompt that leave room for an ``answer`` of so many, or for one of some length if that is open."""
    limit = limits.max_model_len
    return max(1, limit - (answer if answer and answer > 0 else limit // ANSWER_SHARE or 1))


def begun_with(text: TextModel, prompt: list[int]) -> int:
    """How many of its first tokens are those that the tokenizer puts before any text (BOS, [CLS]): models are lost
    without them."""
    [around] = text.encode([""], True)
    same = 0
    while same < min(len(around), len(prompt)) and around[same] == prompt[same]:
        same += 1
    return same


def of_texts(text: TextModel, prompts: list[list[int]], most: int | None, side: Side | None = None) -> list[list[int]]:
    """Prompts that come from texts, with at most so many tokens; None: all."""
    if most is None:
        return prompts
    return [cut(prompt, most, side, begun_with(text, prompt)) for prompt in prompts]


def of_ids(prompts: list[list[int]], most: int | None, side: Side | None = None) -> list[list[int]]:
    """Prompts that come as token ids: those on one side, whatever the first ones are."""
    return prompts if most is None else [cut(prompt, most, side) for prompt in prompts]
