"""Reasoning, content and calls of tools as messages and deltas of the OpenAI dialect."""

from __future__ import annotations

from typing import Any

from slipstream.server.generation import Piece
from slipstream.server.tools.answer import AnswerParser, Speech
from slipstream.server.tools.parts import CallArguments, CallBegin, Content, Part, Reasoning


def thought(text: str) -> dict[str, Any]:
    """Under both names that clients know: that of DeepSeek, SGLang and llama.cpp, and that of vLLM and Ollama."""
    return {"reasoning_content": text, "reasoning": text}


class SpokenAnswer:
    """One answer, in pieces or as a whole."""

    def __init__(self, speech: Speech, tells_thoughts: bool = True) -> None:
        self._speech, self._tells_thoughts = speech, tells_thoughts
        self._parser = AnswerParser(speech)
        self.thoughts: list[str] = []
        """What was thought so far, whether it is told or not."""

    def deltas(self, text: str, is_last: bool) -> list[dict[str, Any]]:
        """What a piece of text adds."""
        return [self._delta(part) for part in self._parts(text, is_last)]

    def _parts(self, text: str, is_last: bool) -> list[Part]:
        parts = self._parser.push(text)
        if is_last:
            parts += self._parser.finish()
        self.thoughts += [part.text for part in parts if isinstance(part, Reasoning)]
        return parts if self._tells_thoughts else [part for part in parts if not isinstance(part, Reasoning)]

    def message(self, text: str) -> dict[str, Any]:
        """The fields of a whole answer that depend on its text."""
        content: list[str] = []
        calls: list[dict[str, Any]] = []
        arguments: list[list[str]] = []
        for part in self._parts(text, is_last=True):
            match part:
                case Content():
                    content.append(part.text)
                case CallBegin():
                    calls.append(self._call(part))
                    arguments.append([])
                case CallArguments():
                    arguments[-1].append(part.text)
        for call, said in zip(calls, arguments, strict=True):
            call["function"]["arguments"] = "".join(said)
        found: dict[str, Any] = {"content": "".join(content) if content or not calls else None}
        if self.thoughts and self._tells_thoughts:
            found |= thought("".join(self.thoughts))
        if calls and self._speech.as_functions:
            [call] = calls
            found["function_call"] = call["function"]
        elif calls:
            found["tool_calls"] = calls
        return found

    def finish_reason(self, piece: Piece) -> str | None:
        if piece.finish_reason != "stop" or not self._parser.has_calls:
            return piece.finish_reason
        return "function_call" if self._speech.as_functions else "tool_calls"

    def _delta(self, part: Part) -> dict[str, Any]:
        match part:
            case Content():
                return {"content": part.text}
            case Reasoning():
                return thought(part.text)
            case CallBegin() if self._speech.as_functions:
                return {"function_call": self._call(part)["function"]}
            case CallArguments() if self._speech.as_functions:
                return {"function_call": {"arguments": part.text}}
            case CallBegin():
                return {"tool_calls": [{"index": part.index, **self._call(part)}]}
            case CallArguments():
                return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}

    def _call(self, begun: CallBegin) -> dict[str, Any]:
        id_ = self._speech.new_id(begun.name, begun.index)
        return {"id": id_, "type": "function", "function": {"name": begun.name, "arguments": ""}}
