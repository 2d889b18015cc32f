"""Answers of /v1/messages: one message of blocks, or the events in which it comes to be."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from slipstream.server.generation import Generation, Piece, Sequence
from slipstream.server.tools.answer import Speech
from slipstream.server.tools.blocks import Block, BlockEvent, Blocks

encode = msgspec.json.Encoder().encode


class MessageWriter:
    def __init__(self, generation: Generation, model: str, speech: Speech | None, shows_thinking: bool = True) -> None:
        """Without ``shows_thinking`` it is told that the model thinks, but not what."""
        self._generation, self._model = generation, model
        self._shows_thinking = shows_thinking
        self._blocks = Blocks(speech)
        self._last: Piece | None = None
        self._is_open = False

    def chunk(self, sequence: Sequence, piece: Piece) -> bytes:
        told = b""
        if not self._is_open:
            self._is_open = True
            told = event("message_start", message=self._message([], None))
        for found in self._push(piece):
            told += self._told(found)
        return told

    def end(self) -> bytes:
        reason, sequence = self._reason()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return event("message_delta", delta=delta, usage=self._usage()) + event("message_stop")

    def body(self, answers: list[Piece]) -> bytes:
        self._push(answers[0])
        return encode(self._message([self._content(block) for block in self._blocks.blocks], self._reason()))

    def _push(self, piece: Piece) -> list[BlockEvent]:
        self._last = piece
        return self._blocks.push(piece.text, piece.finish_reason is not None)

    def _reason(self) -> tuple[str, str | None]:
        assert self._last is not None
        # Nor is an answer whole that was aborted, or that its structure ended near max_tokens.
        if self._last.finish_reason != "stop" or self._last.is_shortened:
            return "max_tokens", None
        if isinstance(self._last.stop_reason, str):
            return "stop_sequence", self._last.stop_reason
        return "tool_use" if self._blocks.has_calls else "end_turn", None

    def _message(self, content: list[dict[str, Any]], reason: tuple[str, str | None] | None) -> dict[str, Any]:
        return {
            "id": self._generation.name,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None if reason is None else reason[0],
            "stop_sequence": None if reason is None else reason[1],
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        """What was found in the cache is not counted twice."""
        prompt, cached, completion = self._generation.count_tokens()
        return {
            "input_tokens": prompt - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": completion,
        }

    def _content(self, block: Block) -> dict[str, Any]:
        match block.kind:
            case "text":
                return {"type": "text", "text": block.text}
            case "reasoning":
                return {"type": "thinking", "thinking": block.text if self._shows_thinking else "", "signature": ""}
            case "call":
                return {"type": "tool_use", "id": block.id, "name": block.name, "input": arguments(block.text)}

    def _told(self, found: BlockEvent) -> bytes:
        block = found.block
        match found.kind:
            case "begin":
                empty = Block(block.index, block.kind, block.name, block.id)
                return event("content_block_start", index=block.index, content_block=self._content(empty))
            case "more":
                delta: dict[str, Any] = {"type": "text_delta", "text": found.text}
                if block.kind == "reasoning":
                    if not self._shows_thinking:
                        return b""
                    delta = {"type": "thinking_delta", "thinking": found.text}
                elif block.kind == "call":
                    delta = {"type": "input_json_delta", "partial_json": found.text}
                return event("content_block_delta", index=block.index, delta=delta)
            case "end":
                return event("content_block_stop", index=block.index)


def arguments(text: str) -> dict[str, Any]:
    """What a tool is called with; nothing where the answer was cut off before that was known."""
    try:
        found = json.loads(text or "{}", strict=False)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, **fields}) + b"\n\n"
