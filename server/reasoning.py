"""What a model thinks before it answers, between tags, told apart from the answer."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.server.tools.parts import Content, Part, Reasoning, beginning_of


@dataclass(frozen=True)
class Tags:
    begin: str
    end: str


TAGS = {
    "think": Tags("<think>", "</think>"),
    "magistral": Tags("[THINK]", "[/THINK]"),
    "seed": Tags("<seed:think>", "</seed:think>"),
    "harmony": Tags("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
}
"""By the names that ``--reasoning-parser`` knows; a chat template that has one of the tags tells which.

For the last of them these are what stands around reasoning where a grammar follows; see tools/channels.py."""


def recognized(template: str) -> str | None:
    """The name of the tags that a chat template knows."""
    return next((name for name, tags in TAGS.items() if tags.begin in template or tags.end in template), None)


def is_open(tags: Tags, prompt: str, said: str = "") -> bool | None:
    """Whether the answer to a prompt begins with reasoning: the template has written the first tag (True), or both, so
    that there is none (False); None: the model decides. ``said`` is what an answer that goes on has said before: it is
    still reasoning, or has none to come."""
    if said.strip():
        return said.rfind(tags.begin) > said.rfind(tags.end)
    end = prompt.rstrip()
    return True if end.endswith(tags.begin) else False if end.endswith(tags.end) else None


class ReasoningParser:
    """White space around the tags is left out."""

    def __init__(self, tags: Tags, is_open: bool | None) -> None:
        self._tags = tags
        self._state = "inside" if is_open else "outside" if is_open is False else "start"
        self._text = ""
        self._trims = self._state == "inside"

    def push(self, text: str) -> list[Part]:
        self._text += text
        found: list[Part] = []
        if self._state == "start":
            rest = self._text.lstrip()
            if rest.startswith(self._tags.begin):
                self._text, self._state, self._trims = rest[len(self._tags.begin) :], "inside", True
            elif not self._tags.begin.startswith(rest):
                self._state = "outside"
        if self._state == "inside":
            told, end, after = self._text.partition(self._tags.end)
            if end:
                told = told.rstrip()
            else:  # a tag may have begun, and white space may be that before it
                told = told[: beginning_of(told, (self._tags.end,))].rstrip()
                after = self._text[len(told) :]
            self._text = after
            if told := told.lstrip() if self._trims else told:
                self._trims = False
                found.append(Reasoning(told))
            if end:
                self._state, self._trims = "outside", True
        if self._state == "outside":
            told = self._text.lstrip() if self._trims else self._text
            self._text = ""
            if told:
                self._trims = False
                found.append(Content(told))
        return found

    def finish(self) -> list[Part]:
        rest, self._text = self._text.lstrip() if self._trims else self._text, ""
        if not rest:
            return []
        return [Reasoning(rest)] if self._state == "inside" else [Content(rest)]
