"""Answers in the OpenAI dialect. Chunks are put together from prepared bytes: one is written for every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from slipstream.server.generation import Generation, Piece, Sequence
from slipstream.server.openai.logprobs import LogprobFormatter
from slipstream.server.openai.spoken import SpokenAnswer
from slipstream.server.responses import DONE
from slipstream.server.tools.answer import Speech

encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What an answer contains besides the text."""

    model: str
    created: int
    system_fingerprint: str
    logprobs: int | None = None
    """Alternatives per token; None for no log-probabilities."""
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    return_metrics: bool = False
    """Whether to write what the answer took; in a stream, in a last chunk."""
    include_usage: bool = False
    """Whether to end a stream with a chunk with the usage."""
    continuous_usage: bool = False


def usage(generation: Generation, following: int = 0) -> dict[str, Any]:
    """``following``: generated tokens that do not count yet."""
    prompt, cached, completion = generation.count_tokens()
    completion -= following
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class OpenAIWriter:
    """What chat and completions have in common."""

    object_name: str
    chunk_name: str

    def __init__(self, generation: Generation, options: AnswerOptions, formatter: LogprobFormatter) -> None:
        self.generation = generation
        self.options = options
        self.formatter = formatter
        self._head = encode(
            {
                "id": generation.name,
                "object": self.chunk_name,
                "created": options.created,
                "model": options.model,
                "system_fingerprint": options.system_fingerprint,
            }
        )[:-1]
        self._tail = b',"usage":null}\n\n' if options.include_usage else b"}\n\n"

    def whole_usage(self) -> dict[str, Any]:
        """What is told at the end."""
        return usage(self.generation)

    def event(self, choices: bytes, extra: bytes = b"", following: int = 0) -> bytes:
        """``following``: generated tokens that another chunk is to tell of."""
        tail = self._tail
        if self.options.continuous_usage:
            tail = b',"usage":' + encode(usage(self.generation, following)) + b"}\n\n"
        return b"".join((b"data: ", self._head, b',"choices":[', choices, b"]", extra, tail))

    def end(self) -> bytes:
        if not self.options.include_usage and not self.options.return_metrics:
            return DONE
        last = b"null"
        if self.options.include_usage:
            last = encode(self.whole_usage())
        if self.options.return_metrics:
            last += b',"metrics":' + encode(self.generation.metrics())
        return b"".join((b"data: ", self._head, b',"choices":[],"usage":', last, b"}\n\n", DONE))

    def envelope(self, choices: list[dict[str, Any]], **extra: Any) -> bytes:
        if self.options.return_metrics:
            extra["metrics"] = self.generation.metrics()
        return encode(
            {
                "id": self.generation.name,
                "object": self.object_name,
                "created": self.options.created,
                "model": self.options.model,
                "system_fingerprint": self.options.system_fingerprint,
                "choices": choices,
                "usage": self.whole_usage(),
                **extra,
            }
        )


class ChatWriter(OpenAIWriter):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(
        self,
        generation: Generation,
        options: AnswerOptions,
        formatter: LogprobFormatter,
        speech: Speech | None = None,
        tells_thoughts: bool = True,
    ) -> None:
        """``speech`` says what is looked for in the text; None: it is content as a whole."""
        super().__init__(generation, options, formatter)
        self._spoken: list[SpokenAnswer] = []
        if speech is not None:
            self._spoken = [SpokenAnswer(speech, tells_thoughts) for _ in generation.sequences]
        self._thinks = speech is not None and speech.reasoning is not None

    def whole_usage(self) -> dict[str, Any]:
        found = usage(self.generation)
        if self._thinks:
            tokens = sum(self.formatter.tokenizer.count("".join(each.thoughts)) for each in self._spoken)
            found["completion_tokens_details"] = {"reasoning_tokens": min(tokens, found["completion_tokens"])}
        return found

    def chunk(self, sequence: Sequence, piece: Piece) -> bytes:
        options = self.options
        told = self._role(sequence, len(piece.tokens)) if piece.first else b""
        if self._spoken:
            return told + self._spoken_chunk(sequence, piece, self._spoken[sequence.index])
        logprobs = b"null"
        if options.logprobs is not None and piece.logprobs:
            logprobs = encode(self.formatter.chat(piece.logprobs, options.logprobs))
        ids = b',"token_ids":' + encode(piece.tokens) if options.return_token_ids else b""
        if piece.text or piece.tokens:  # tokens whose text is held back are progress too
            told += self.event(
                b"".join(
                    (
                        b'{"index":%d,"delta":{"content":' % sequence.index,
                        encode(piece.text),
                        b'},"logprobs":',
                        logprobs,
                        b',"finish_reason":null',
                        ids,
                        b"}",
                    )
                )
            )
        if piece.finish_reason is None:
            return told
        reasons = (sequence.index, encode(piece.finish_reason), encode(piece.stop_reason))
        return told + self.event(
            b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b,"stop_reason":%b}' % reasons
        )

    def _spoken_chunk(self, sequence: Sequence, piece: Piece, spoken: SpokenAnswer) -> bytes:
        """A chunk for each part of a piece; what it says of tokens is in the first."""
        options = self.options
        deltas = spoken.deltas(piece.text, piece.finish_reason is not None)
        logprobs = options.logprobs is not None and bool(piece.logprobs)
        if not deltas and (logprobs or (options.return_token_ids and piece.tokens)):
            deltas = [{}]
        told = b""
        for delta in deltas:
            choice: dict[str, Any] = {"index": sequence.index, "delta": delta, "logprobs": None, "finish_reason": None}
            if logprobs:
                choice["logprobs"] = self.formatter.chat(piece.logprobs, options.logprobs or 0)
            if options.return_token_ids:
                choice["token_ids"] = [] if told else piece.tokens
            logprobs = False
            told += self.event(encode(choice))
        if piece.finish_reason is not None:
            choice = {"index": sequence.index, "delta": {}, "logprobs": None}
            choice["finish_reason"], choice["stop_reason"] = spoken.finish_reason(piece), piece.stop_reason
            told += self.event(encode(choice))
        return told

    def body(self, answers: list[Piece]) -> bytes:
        first = self.generation.sequences[0]
        extra: dict[str, Any] = {"prompt_token_ids": None, "prompt_logprobs": None}
        if self.options.return_token_ids:
            extra["prompt_token_ids"] = first.prompt
        if self.options.prompt_logprobs is not None:
            extra["prompt_logprobs"] = self._prompt_logprobs(first)
        choices = [
            self._choice(sequence, answer) for sequence, answer in zip(self.generation.sequences, answers, strict=True)
        ]
        return self.envelope(choices, **extra)

    def _role(self, sequence: Sequence, following: int) -> bytes:
        """What comes before the first tokens, of which the usage tells in the next chunk."""
        extra = b""
        if sequence.index == 0:
            if self.options.return_token_ids:
                extra += b',"prompt_token_ids":' + encode(sequence.prompt)
            if self.options.prompt_logprobs is not None:
                extra += b',"prompt_logprobs":' + encode(self._prompt_logprobs(sequence))
        choice = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return self.event(choice % sequence.index, extra, following)

    def _choice(self, sequence: Sequence, answer: Piece) -> dict[str, Any]:
        options = self.options
        logprobs = None if options.logprobs is None else self.formatter.chat(answer.logprobs, options.logprobs)
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        spoken = self._spoken[sequence.index] if self._spoken else None
        if spoken is not None:
            message |= spoken.message(answer.text)
        return {
            "index": sequence.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": answer.finish_reason if spoken is None else spoken.finish_reason(answer),
            "stop_reason": answer.stop_reason,
            "token_ids": answer.tokens if options.return_token_ids else None,
        }

    def _prompt_logprobs(self, sequence: Sequence) -> list[dict[str, Any] | None]:
        assert self.options.prompt_logprobs is not None
        return self.formatter.prompt(sequence.prompt_logprobs, self.options.prompt_logprobs)


NOT_ASKED = dict.fromkeys(("prompt_token_ids", "token_ids", "prompt_logprobs"))
"""What programs look for in each choice, as in vLLM's, whether they have asked for it or not."""


class CompletionWriter(OpenAIWriter):
    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(
        self,
        generation: Generation,
        options: AnswerOptions,
        formatter: LogprobFormatter,
        echo: list[str] | None,
    ) -> None:
        """``echo`` holds the text of each sequence's prompt if it is to precede the answer."""
        super().__init__(generation, options, formatter)
        self._echo = echo

    def chunk(self, sequence: Sequence, piece: Piece) -> bytes:
        told = b""
        if piece.text or piece.first or piece.tokens:
            told = self.event(
                b"".join(
                    (
                        b'{"index":%d,"text":' % sequence.index,
                        encode(self._text(sequence, piece)),
                        b',"logprobs":',
                        encode(self._logprobs(sequence, piece)),
                        b',"finish_reason":null',
                        b"".join(
                            b',"%b":%b' % (name.encode(), encode(value))
                            for name, value in self._extras(sequence, piece).items()
                        ),
                        b"}",
                    )
                )
            )
        if piece.finish_reason is None:
            return told
        reasons = (sequence.index, encode(piece.finish_reason), encode(piece.stop_reason))
        return told + self.event(
            b'{"index":%d,"text":"","logprobs":null,"finish_reason":%b,"stop_reason":%b}' % reasons
        )

    def body(self, answers: list[Piece]) -> bytes:
        return self.envelope(
            [
                {
                    "index": sequence.index,
                    "text": self._text(sequence, answer),
                    "logprobs": self._logprobs(sequence, answer),
                    "finish_reason": answer.finish_reason,
                    "stop_reason": answer.stop_reason,
                    **(NOT_ASKED | self._extras(sequence, answer)),
                }
                for sequence, answer in zip(self.generation.sequences, answers, strict=True)
            ]
        )

    def _text(self, sequence: Sequence, piece: Piece) -> str:
        return self._echo[sequence.index] + piece.text if piece.first and self._echo is not None else piece.text

    def _logprobs(self, sequence: Sequence, piece: Piece) -> dict[str, Any] | None:
        if self.options.logprobs is None:
            return None
        echoed = piece.first and self._echo is not None
        tokens = sequence.prompt + piece.tokens if echoed else piece.tokens
        entries = [*sequence.prompt_logprobs, *piece.logprobs] if echoed else piece.logprobs
        offsets = piece.offsets
        if self._echo is not None:
            echo = self._echo[sequence.index]
            offsets = [len(echo) + offset for offset in offsets]
            if piece.first:
                offsets = self.formatter.prompt_offsets(sequence.prompt, echo) + offsets
        return self.formatter.legacy(tokens, entries, self.options.logprobs, offsets)

    def _extras(self, sequence: Sequence, piece: Piece) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self.options.return_token_ids:
            if piece.first:
                extras["prompt_token_ids"] = sequence.prompt
            extras["token_ids"] = piece.tokens
        if piece.first and self.options.prompt_logprobs is not None:
            extras["prompt_logprobs"] = self.formatter.prompt(sequence.prompt_logprobs, self.options.prompt_logprobs)
        return extras
