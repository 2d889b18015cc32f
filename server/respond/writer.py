"""Answers of /v1/responses: one object of items, or the events in which it comes to be."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec

from slipstream.engine.messages import FinishReason
from slipstream.server.errors import ApiError
from slipstream.server.generation import Generation, Piece, Sequence
from slipstream.server.openai.logprobs import LogprobFormatter
from slipstream.server.respond.logprobs import TextLogprobs
from slipstream.server.respond.schema import RespondBody
from slipstream.server.respond.tools import Called, as_input, offered
from slipstream.server.text import Tokenizer
from slipstream.server.tools.answer import Speech
from slipstream.server.tools.blocks import Block, BlockEvent, Blocks

encode = msgspec.json.Encoder().encode
PREFIXES = {"reasoning": "rs_", "text": "msg_", "call": "fc_"}
CUSTOM_PREFIX = "ctc_"


class ResponseWriter:
    """``on_end`` is told the whole response, as the client is, when it is complete or has failed. With ``logprobs``,
    each token of the text comes with so many alternatives; pieces tell where tokens begin."""

    def __init__(
        self,
        generation: Generation,
        asked: RespondBody,
        model: str,
        speech: Speech | None,
        tokenizer: Tokenizer,
        on_end: Callable[[dict[str, Any]], None],
        logprobs: int | None = None,
    ) -> None:
        self._generation, self._tokenizer, self._on_end = generation, tokenizer, on_end
        self._blocks = Blocks(speech)
        self._called = {each.name: each.called for each in offered(asked.tools or ())}
        self._logprobs: TextLogprobs | None = None
        if logprobs is not None:
            self._logprobs = TextLogprobs(LogprobFormatter(tokenizer, as_token_ids=False), logprobs)
        self._ids: list[str] = []
        """The ids of the items."""
        self._number = 0
        self._is_open = False
        self._finish: FinishReason | None = None
        self._is_shortened = False
        self._response = about(asked, generation.name, model)

    @property
    def response(self) -> dict[str, Any]:
        """As far as it is known."""
        return self._response

    def begin(self) -> bytes:
        """The first events of a stream, of which nobody has to wait for the first piece; ``chunk`` has them else."""
        self._is_open = True
        told = self._event("response.created", response=self._response)
        return told + self._event("response.in_progress", response=self._response)

    def chunk(self, sequence: Sequence, piece: Piece) -> bytes:
        told = b"" if self._is_open else self.begin()
        for event, logprobs in self._push(piece):
            told += self._told(event, logprobs)
        return told

    def end(self) -> bytes:
        done = self._done()
        return self._event(
            "response.completed" if done["status"] == "completed" else "response.incomplete", response=done
        )

    def body(self, answers: list[Piece]) -> bytes:
        self._push(answers[0])
        return encode(self._done())

    def failed(self, error: ApiError) -> bytes:
        """The last event of a stream that failed."""
        return self._event("response.failed", response=self.fail(error))

    def fail(self, error: ApiError) -> dict[str, Any]:
        """The response that came to nothing."""
        self._finish = "error"
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        self._response["output"] = self._items()
        self._on_end(self._response)
        return self._response

    def _push(self, piece: Piece) -> list[tuple[BlockEvent, list[dict[str, Any]]]]:
        """Events, and the log-probabilities that belong to them."""
        self._finish, self._is_shortened = piece.finish_reason, piece.is_shortened
        found: list[tuple[BlockEvent, list[dict[str, Any]]]]
        if self._logprobs is None:
            found = [(event, []) for event in self._blocks.push(piece.text, piece.finish_reason is not None)]
        else:
            cut, told = self._logprobs.cut(piece), self._logprobs.told
            found = [(event, told(event)) for text, is_last in cut for event in self._blocks.push(text, is_last)]
        self._ids += [self._prefix(each.block) + secrets.token_hex(16) for each, _ in found if each.kind == "begin"]
        return found

    def _called_by(self, block: Block) -> Called:
        return self._called.get(block.name, Called(block.name))

    def _prefix(self, block: Block) -> str:
        return CUSTOM_PREFIX if block.kind == "call" and self._called_by(block).is_custom else PREFIXES[block.kind]

    def _done(self) -> dict[str, Any]:
        status = "completed" if self._finish == "stop" else "cancelled" if self._finish == "abort" else "incomplete"
        is_cut = status == "incomplete"
        self._response |= {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut or self._is_shortened else None,
            "output": self._items(),
            "usage": self._usage(),
        }
        self._on_end(self._response)
        return self._response

    def _usage(self) -> dict[str, Any]:
        prompt, cached, completion = self._generation.count_tokens()
        thought = "".join(block.text for block in self._blocks.blocks if block.kind == "reasoning")
        count = self._tokenizer.count(thought)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": min(count, completion)},
            "total_tokens": prompt + completion,
        }

    def _items(self) -> list[dict[str, Any]]:
        return [self._item(block, self._item_status(block)) for block in self._blocks.blocks]

    def _item_status(self, block: Block) -> str:
        """An answer that was cut off was so in its last item."""
        is_cut = self._finish not in (None, "stop") and block is self._blocks.blocks[-1]
        return "incomplete" if is_cut else "completed"

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        found: dict[str, Any] = {"id": self._ids[block.index], "status": status}
        match block.kind:
            case "text":
                part = text_part(block.text, self._block_logprobs(block))
                return found | {"type": "message", "role": "assistant", "content": [part]}
            case "reasoning":
                content = [{"type": "reasoning_text", "text": block.text}]
                return found | {"type": "reasoning", "summary": [], "content": content}
            case "call":
                called = self._called_by(block)
                found |= {"call_id": block.id, "name": called.name}
                if called.namespace is not None:
                    found["namespace"] = called.namespace
                if called.is_custom:
                    return found | {"type": "custom_tool_call", "input": as_input(block.text)}
                arguments = block.text if status != "completed" else block.text or "{}"
                return found | {"type": "function_call", "arguments": arguments}

    def _block_logprobs(self, block: Block) -> list[dict[str, Any]]:
        return [] if self._logprobs is None else self._logprobs.blocks[block.index]

    def _told(self, event: BlockEvent, logprobs: list[dict[str, Any]]) -> bytes:
        block = event.block
        where = {"output_index": block.index, "item_id": self._ids[block.index]}
        part = where | {"content_index": 0}
        of_text = block.kind == "text"
        name = "response.output_text" if of_text else "response.reasoning_text"
        match event.kind:
            case "begin":
                empty = self._item(Block(block.index, block.kind, block.name, block.id), "in_progress")
                if block.kind != "call":
                    empty["content"] = []
                told = self._event("response.output_item.added", output_index=block.index, item=empty)
                if block.kind == "call":
                    return told
                begun = text_part("", []) if of_text else {"type": "reasoning_text", "text": ""}
                return told + self._event("response.content_part.added", part=begun, **part)
            case "more":
                if block.kind == "call" and self._called_by(block).is_custom:
                    return b""  # what the input is shows at its end
                if block.kind == "call":
                    return self._event("response.function_call_arguments.delta", delta=event.text, **where)
                extra: dict[str, Any] = {"logprobs": logprobs} if of_text else {}
                return self._event(f"{name}.delta", delta=event.text, **extra, **part)
            case "end":
                item = self._item(block, self._item_status(block))
                if item["type"] == "custom_tool_call":
                    name, said = "response.custom_tool_call_input", item["input"]
                    told = self._event(f"{name}.delta", delta=said, **where) if said else b""
                    told += self._event(f"{name}.done", input=said, **where)
                elif block.kind == "call":
                    about = {"arguments": item["arguments"], "name": item["name"]}
                    told = self._event("response.function_call_arguments.done", **about, **where)
                else:
                    extra = {"logprobs": self._block_logprobs(block)} if of_text else {}
                    told = self._event(f"{name}.done", text=block.text, **extra, **part)
                    told += self._event("response.content_part.done", part=item["content"][0], **part)
                return told + self._event("response.output_item.done", output_index=block.index, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + encode(event) + b"\n\n"


def text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def about(asked: RespondBody, response_id: str, model: str) -> dict[str, Any]:
    """A response of which nothing has been said yet."""
    form = None if asked.text is None or asked.text.format is None else asked.text.format
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(asked.background),
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": asked.max_tool_calls,
        "metadata": asked.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": None if asked.reasoning is None else asked.reasoning.effort, "summary": None},
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "store": asked.store is not False,
        "temperature": asked.temperature,
        "text": {
            "format": {"type": "text"} if form is None else form.model_dump(exclude_none=True, by_alias=True),
            "verbosity": "medium",
        },
        "tool_choice": asked.tool_choice or "auto",
        "tools": asked.tools or [],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": asked.top_p,
        "truncation": asked.truncation or "disabled",
        "usage": None,
        "user": asked.user,
    }
