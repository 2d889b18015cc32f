"""The line with which Claude Code begins its system prompt, about who pays for the request.

It is another one with every request, so that no prompt that has it would be found in the prefix cache. vLLM leaves it
out, too.
"""

from __future__ import annotations

from typing import Any

HEADER = "x-anthropic-billing-header:"


def without_header(text: str) -> str:
    """What follows that line; all of the text if it does not begin with it."""
    return text.partition("\n")[2] if text.startswith(HEADER) else text


def part_without_header(part: dict[str, Any]) -> dict[str, Any] | None:
    """A part of a content; None if it has nothing else."""
    text = without_header(part["text"])
    return part | {"text": text} if text or not part["text"] else None
