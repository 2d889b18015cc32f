"""Prompts that are too long, made shorter where a request asks for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slipstream.server.http.body import Body
from slipstream.server.openai.fields import ALL_THAT_FIT, Side, Truncation

if TYPE_CHECKING:
    from slipstream.server.preparing.prepared import Limits
    from slipstream.server.preparing.text_model import TextModel

ANSWER_SHARE = 8
"""The context by the room that a prompt leaves for an answer whose length is not said."""


class TruncationFields(Body):
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: Side | None = None


def shortened(
    text: TextModel,
    limits: Limits,
    prompts: list[list[int]],
    asked: TruncationFields,
    answer: int | None,
    from_texts: bool = True,
) -> list[list[int]]:
    """Prompts of at most as many tokens as are asked for; those that are no longer are the same objects.

    ``answer``: how many tokens are to follow, see ``room_beside``. What the tokenizer puts before any text stays,
    unless the prompts came as token ids.
    """
    most = asked.truncate_prompt_tokens
    if most is None:
        return prompts
    if most == ALL_THAT_FIT:
        most = room_beside(limits, answer)
    return [
        prompt
        if len(prompt) <= most
        else cut(prompt, most, asked.truncation_side, begun_with(text, prompt) if from_texts else 0)
        for prompt in prompts
    ]


def room_beside(limits: Limits, answer: int | None) -> int:
    """Tokens of a prompt that leave room for an ``answer`` of so many; for one of some length if that is open, which
    None and negative numbers say."""
    limit = limits.max_model_len
    is_open = answer is None or answer < 0
    return max(1, limit - (limit // ANSWER_SHARE or 1 if is_open else answer or 0))


def cut(prompt: list[int], most: int, side: Side | None, kept: int) -> list[int]:
    """So many tokens of a longer one: the first ones if what is on the right goes, else the first ``kept`` ones, and as
    many of the last as there is room for."""
    if side == "right":
        return prompt[:most]
    kept = kept if kept < most else 0
    return prompt[:kept] + prompt[len(prompt) - (most - kept) :]


def begun_with(text: TextModel, prompt: list[int]) -> int:
    """How many of its first tokens are those that the tokenizer puts before any text (BOS, [CLS]): models are lost
    without them."""
    [around] = text.encode([""], True)
    same = 0
    while same < min(len(around), len(prompt)) and around[same] == prompt[same]:
        same += 1
    return same
