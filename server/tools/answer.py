"""Takes the text of an answer apart: reasoning, content, calls of tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slipstream.server.tools.calls import CallParser
from slipstream.server.tools.channels import ChannelParser
from slipstream.server.tools.formats import FORMATS
from slipstream.server.tools.parts import Content, Part, Reasoning
from slipstream.server.tools.reasoning import TAGS, ReasoningParser
from slipstream.server.tools.tagged import Kinds
from slipstream.server.tools.thoughts import CallsInThought

CHANNELS = "harmony"
"""The reasoning whose tags also tell of calls."""
PIECE_CHARS = 2048
"""Parsers copy what is left of a piece with every step, so a text that comes at once is cut into pieces, too."""


@dataclass(frozen=True)
class Speech:
    """What is to be looked for in the answers to a conversation."""

    tool_format: str | None = None
    """Name of the format of calls; None: there are none."""
    tool_names: tuple[str, ...] = ()
    kinds: Mapping[str, Mapping[str, Kinds]] = field(default_factory=dict)
    """What the arguments of tools are, where their format does not tell."""
    most_calls: int | None = None
    reasoning: str | None = None
    """Name of the tags around reasoning; None: there is none."""
    is_open: bool | None = None
    """See reasoning.is_open."""
    keeps_special: bool = False
    """What is looked for is written with special tokens, so they have to be in the text."""
    by_grammar: bool = False
    """A grammar tells where calls stand: what models write elsewhere by mistake is none."""
    calls_before: int = 0
    """How many calls the conversation has already."""
    as_functions: bool = False
    """Whether the client knows calls by their first name only: one ``function_call`` in an answer."""

    def new_id(self, name: str, index: int) -> str:
        """An id for the ``index``-th call of an answer, which calls the tool ``name``."""
        assert self.tool_format is not None
        return FORMATS[self.tool_format].new_id(name, self.calls_before + index)


class AnswerParser:
    """For one answer; what the parts add up to does not depend on how the text is cut."""

    def __init__(self, speech: Speech) -> None:
        tags = TAGS[speech.reasoning] if speech.reasoning else None
        self._channels = ChannelParser(speech.tool_names, speech.most_calls) if speech.reasoning == CHANNELS else None
        self._reasoning = self._channels or (ReasoningParser(tags, speech.is_open) if tags else None)
        form = FORMATS[speech.tool_format] if speech.tool_format else None

        def new_parser() -> CallParser:
            assert form is not None
            return CallParser(form, speech.tool_names, speech.most_calls, speech.kinds, speech.by_grammar)

        self._calls = new_parser() if form else None
        looks_in_thoughts = tags is not None and self._channels is None and not speech.by_grammar
        self._thoughts = CallsInThought(new_parser) if form and form.begins and looks_in_thoughts else None

    @property
    def has_calls(self) -> bool:
        return any(parser is not None and parser.num_calls for parser in (self._calls, self._thoughts, self._channels))

    def push(self, text: str) -> list[Part]:
        pieces = [text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS)]
        return [part for piece in pieces for part in self._push(piece)]

    def _push(self, text: str) -> list[Part]:
        return self._look_for_calls(self._reasoning.push(text) if self._reasoning else [Content(text)])

    def finish(self) -> list[Part]:
        found = self._look_for_calls(self._reasoning.finish() if self._reasoning else [])
        found += self._thoughts.finish() if self._thoughts else []
        return found + (self._calls.finish() if self._calls else [])

    def _look_for_calls(self, parts: list[Part]) -> list[Part]:
        if self._calls is None:
            return [part for part in parts if not isinstance(part, Content) or part.text]
        found: list[Part] = []
        for part in parts:
            if isinstance(part, Content) and not (self._channels and self._channels.num_calls):
                found += self._thoughts.give_up() if self._thoughts else []
                found += self._calls.push(part.text)
            elif isinstance(part, Reasoning) and self._thoughts:
                found += self._thoughts.push(part.text)
            else:
                found.append(part)
        return found
