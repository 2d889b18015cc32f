"""What a model thinks before it answers, between tags, told apart from the answer."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.server.tools.parts import Content, Reasoning, StepParser, beginning_of


@dataclass(frozen=True)
class Tags:
    begin: str
    end: str
    around_answers: tuple[str, ...] = ()
    """What stands around what is said after the reasoning, and is none of it."""


TAGS = {
    "think": Tags("<think>", "</think>"),
    "magistral": Tags("[THINK]", "[/THINK]"),
    "seed": Tags("<seed:think>", "</seed:think>"),
    "harmony": Tags("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "command": Tags(
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    ),
    "gemma4": Tags("<|channel>thought\n", "<channel|>"),
    "granite": Tags("Here is my thought process:", "Here is my response:"),
    "apertus": Tags("<|inner_prefix|>", "<|inner_suffix|>"),
    "longcat": Tags("<longcat_think>", "</longcat_think>"),
}
"""By the names that ``--reasoning-parser`` knows; a chat template that has one of the tags tells which.

For harmony these are what stands around reasoning where a grammar follows; see tools/channels.py."""


def recognized(template: str) -> str | None:
    """The name of the tags that a chat template knows."""
    return next((name for name, tags in TAGS.items() if _has(template, tags.begin) or _has(template, tags.end)), None)


def _has(template: str, tag: str) -> bool:
    """Templates write the end of a line in a text as ``\\n``."""
    return tag in template or tag.replace("\n", "\\n") in template


def is_open(tags: Tags, prompt: str, said: str = "") -> bool | None:
    """Whether the answer to a prompt begins with reasoning: the template has written the first tag (True), or both, so
    that there is none (False); None: the model decides. ``said`` is what an answer that goes on has said before: it is
    still reasoning, or has none to come."""
    begin, end_tag = tags.begin.rstrip(), tags.end.rstrip()
    if said.strip():
        return said.rfind(begin) > said.rfind(end_tag)
    end = prompt.rstrip()
    return True if end.endswith(begin) else False if end.endswith(end_tag) else None


class ReasoningParser(StepParser):
    """White space around the tags is left out."""

    def __init__(self, tags: Tags, is_open: bool | None) -> None:
        super().__init__(self._inside if is_open else self._outside if is_open is False else self._start)
        self._tags = tags
        self._trims = bool(is_open)
        """White space is to be left out."""
        self._space: list[str] = []
        """White space of which it is not known yet what comes after it."""

    def _end_of_text(self) -> None:
        inside = self._step == self._inside
        if self._step == self._start:
            self._text, self._space = "".join([*self._space, self._text]), []
        self._tell(self._text, inside)
        if self._space and not self._trims:
            self._add("".join(self._space), inside)

    # Each of these digests some of the text; False when more has to come first.

    def _start(self) -> bool:
        rest = self._text.lstrip()
        self._space.append(self._text[: len(self._text) - len(rest)])
        self._text = rest
        begin = self._tags.begin
        if rest.startswith(begin):
            self._text, self._trims, self._step = rest[len(begin) :], True, self._inside
        elif begin.startswith(rest):
            return False
        else:
            self._text, self._step = "".join([*self._space, rest]), self._outside
        self._space = []
        return True

    def _inside(self) -> bool:
        said, end, after = self._text.partition(self._tags.end)
        if not end:
            safe = beginning_of(said, (self._tags.end,))
            said, after = said[:safe], said[safe:]
        self._text = after
        self._tell(said, inside=True)
        if end:
            self._space, self._trims, self._step = [], True, self._outside
        return bool(end)

    def _outside(self) -> bool:
        marks = self._tags.around_answers
        at, mark = min(((at, each) for each in marks if (at := self._text.find(each)) >= 0), default=(-1, ""))
        if at < 0:
            at = beginning_of(self._text, marks) if marks else len(self._text)
        self._tell(self._text[:at], inside=False)
        self._text = self._text[at + len(mark) :]
        return bool(mark)

    def _tell(self, said: str, inside: bool) -> None:
        if self._trims:
            said = said.lstrip()
        elif self._space and said.strip():
            said, self._space = "".join([*self._space, said]), []
        if inside:  # white space may be that before the tag
            told = said.rstrip()
            if space := said[len(told) :]:
                self._space.append(space)
            said = told
        if said:
            self._add(said, inside)

    def _add(self, said: str, inside: bool) -> None:
        self._trims = False
        self._found.append(Reasoning(said) if inside else Content(said))
