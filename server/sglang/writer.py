"""Answers of /generate. An event repeats by default what those before it said, so what was said is kept as bytes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import msgspec

from slipstream.engine.messages import TokenLogprobs
from slipstream.server.generation import Generation, Piece, Sequence, WeightSpan
from slipstream.server.responses import DONE
from slipstream.server.service import Service
from slipstream.server.sglang.asked import Asked, Logprobs

encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, kw_only=True)
class WriterOptions:
    many: bool
    """Whether the answer is a list, or a stream of several answers."""
    cumulative: bool
    """Whether an event of a stream repeats what those before it said."""
    with_text: bool
    """Whether log-probabilities tell the texts of their tokens."""
    with_prompt: bool


@dataclass
class Told:
    """What is to be told of one answer, as the inside of JSON values."""

    text: bytearray = field(default_factory=bytearray)
    ids: bytearray = field(default_factory=bytearray)
    logprobs: bytearray = field(default_factory=bytearray)
    top: bytearray = field(default_factory=bytearray)
    asked: bytearray = field(default_factory=bytearray)
    prompt: dict[str, bytes] = field(default_factory=dict)
    """Values of ``meta_info`` about the prompt."""
    tokens: int = 0
    """So far; a sequence may be further than what is being told of it."""

    def clear(self) -> None:
        for each in (self.text, self.ids, self.logprobs, self.top, self.asked):
            each.clear()


class SGLangWriter:
    def __init__(
        self, service: Service, generation: Generation, asked: SequenceOf[Asked], options: WriterOptions
    ) -> None:
        """``asked`` of each sequence."""
        self._service = service
        self._generation = generation
        self._asked = asked
        self._options = options
        self._told = [Told() for _ in generation.sequences]

    def chunk(self, sequence: Sequence, piece: Piece) -> bytes:
        told, asked = self._told[sequence.index], self._asked[sequence.index]
        self._take(told, sequence, piece, asked.logprobs)
        answer = self._answer(told, sequence, piece)
        if self._options.many:
            answer = answer[:-1] + b',"index":%d}' % sequence.index
        if not self._options.cumulative:
            told.clear()
        return b"data: " + answer + b"\n\n"

    def end(self) -> bytes:
        return DONE

    def body(self, answers: list[Piece]) -> bytes:
        found = []
        for sequence, piece in zip(self._generation.sequences, answers, strict=True):
            told = self._told[sequence.index]
            self._take(told, sequence, piece, self._asked[sequence.index].logprobs)
            found.append(self._answer(told, sequence, piece))
        return b"[" + b",".join(found) + b"]" if self._options.many else found[0]

    def _take(self, told: Told, sequence: Sequence, piece: Piece, wanted: Logprobs | None) -> None:
        told.tokens += len(piece.tokens)
        told.text += encode(piece.text)[1:-1]
        append(told.ids, piece.tokens)
        if wanted is None:
            return
        if piece.first:
            told.prompt = self._prompt(sequence, wanted)
        append(told.logprobs, [self._entry(entry.logprob, entry.token) for entry in piece.logprobs])
        if wanted.top:
            append(told.top, [self._top(entry, wanted) for entry in piece.logprobs])
        if wanted.token_ids:
            append(told.asked, [self._chosen(entry, wanted) for entry in piece.logprobs])

    def _answer(self, told: Told, sequence: Sequence, piece: Piece) -> bytes:
        wanted = self._asked[sequence.index].logprobs
        meta = encode(self._meta(told, sequence, piece))[:-1]
        if wanted is not None:
            lists = {"output_token_logprobs": told.logprobs}
            if wanted.top:
                lists["output_top_logprobs"] = told.top
            if wanted.token_ids:
                lists["output_token_ids_logprobs"] = told.asked
            meta += b"".join(b',"%b":[%b]' % (name.encode(), bytes(inside)) for name, inside in lists.items())
            meta += b"".join(b',"%b":%b' % (name.encode(), value) for name, value in told.prompt.items())
        answer = b"".join((b'{"text":"', told.text, b'","output_ids":[', told.ids, b'],"meta_info":', meta, b"}"))
        if self._options.with_prompt:
            answer += b',"prompt_token_ids":' + encode(sequence.prompt)
        return answer + b"}"

    def _meta(self, told: Told, sequence: Sequence, piece: Piece) -> dict[str, Any]:
        version, spans = weight_versions(sequence, told.tokens)
        meta: dict[str, Any] = {
            "id": sequence.id,
            "finish_reason": finish_reason(piece, told.tokens),
            "prompt_tokens": len(sequence.prompt),
            "weight_version": version,
            "weight_versions": spans,
            "num_retractions": sequence.metrics.preemptions,
            "reasoning_tokens": 0,
            "completion_tokens": told.tokens,
            "cached_tokens": sequence.num_cached_tokens,
        }
        if self._asked[sequence.index].logprobs is not None:
            meta["output_token_logprobs_length"] = told.tokens
        if piece.finish_reason is not None:
            meta["e2e_latency"] = time.monotonic() - sequence.metrics.arrival
            if self._service.engine.ready.drafters:
                meta |= speculation(sequence)
        return meta

    def _prompt(self, sequence: Sequence, wanted: Logprobs) -> dict[str, bytes]:
        """Log-probabilities of the prompt from the position on that was asked for."""
        tokens, entries = sequence.prompt[wanted.start :], sequence.prompt_logprobs[wanted.start :]
        found: dict[str, Any] = {
            "input_token_logprobs": [
                self._entry(None if entry is None else entry.logprob, token)
                for token, entry in zip(tokens, entries, strict=False)  # ended before all of it was computed
            ]
        }
        if wanted.top:
            found["input_top_logprobs"] = [None if entry is None else self._top(entry, wanted) for entry in entries]
        if wanted.token_ids:
            found["input_token_ids_logprobs"] = [
                None if entry is None else self._chosen(entry, wanted) for entry in entries
            ]
        return {name: encode(value) for name, value in found.items()}

    def _entry(self, logprob: float | None, token: int) -> tuple[float | None, int, str | None]:
        text = self._service.text.tokenizer.token_text(token) if self._options.with_text else None
        return logprob, token, text

    def _top(self, entry: TokenLogprobs, wanted: Logprobs) -> list[Any]:
        return [self._entry(logprob, token) for token, logprob in entry.top[: wanted.top]]

    def _chosen(self, entry: TokenLogprobs, wanted: Logprobs) -> list[Any]:
        return [self._entry(logprob, token) for token, logprob in zip(wanted.token_ids, entry.asked, strict=True)]


def append(inside: bytearray, values: list[Any]) -> None:
    """Adds values to the inside of a JSON list."""
    if values:
        inside += b"," * bool(inside) + encode(values)[1:-1]


def finish_reason(piece: Piece, tokens: int) -> dict[str, Any] | None:
    match piece.finish_reason:
        case None:
            return None
        case "stop":
            return {"type": "stop", "matched": piece.stop_reason}
        case "length":
            return {"type": "length", "length": tokens}
        case _:
            return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}


def weight_versions(sequence: Sequence, tokens: int) -> tuple[str, list[dict[str, Any]]]:
    """What the weights of the last of so many tokens are called, and those of all of them, by positions.

    Where there is no token, an empty span tells those that serve.
    """
    spans = [span for span in sequence.weight_spans if span.first < tokens] or [WeightSpan(0, sequence.weight_version)]
    ends = [*(span.first for span in spans[1:]), tokens]
    told = [{"version": span.version, "start": span.first, "end": end} for span, end in zip(spans, ends, strict=True)]
    return spans[-1].version, told


def speculation(sequence: Sequence) -> dict[str, Any]:
    """Steps after the one of the first token, and what became of draft tokens in them."""
    metrics = sequence.metrics
    if not metrics.steps:
        return {}
    proposed = sum(drafted for drafted, _ in metrics.accepted)
    accepted = metrics.num_accepted
    histogram = Counter(count for _, count in metrics.accepted)
    histogram[0] += max(0, metrics.steps - len(metrics.accepted))
    return {
        "spec_verify_ct": metrics.steps,
        "spec_accept_length": sequence.num_tokens / metrics.steps,
        "spec_accept_rate": accepted / proposed if proposed else 0.0,
        "spec_num_correct_drafts": accepted,
        "spec_num_proposed_drafts": proposed,
        "spec_correct_drafts_histogram": [histogram[count] for count in range(max(histogram) + 1)],
        # What the same was called before.
        "spec_accept_token_num": accepted,
        "spec_draft_token_num": proposed,
    }
