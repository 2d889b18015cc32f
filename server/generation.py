"""The sequences of one HTTP request: submitted together, read back as pieces of text, ended in every case."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec

from slipstream.engine.handle import RequestStream
from slipstream.engine.messages import FinishReason, NewRequest, TokenDelta, TokenLogprobs
from slipstream.server.errors import GenerationFailedError, InvalidRequestError
from slipstream.server.rollout.groups import Rollout
from slipstream.server.rollout.versions import Called
from slipstream.server.service import Service
from slipstream.server.telemetry.sequence_metrics import SequenceMetrics, sequences_metrics
from slipstream.server.text import IncrementalDetokenizer, OffsetDetokenizer, StopChecker

ALL = 1 << 40
"""More tokens than any answer has."""
SHORTENED = "max_tokens"
"""The stop_reason of an answer that its structure has ended because of this field."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How tokens become text."""

    stop: tuple[str, ...] = ()
    end_texts: tuple[str, ...] = ()
    """What ends an answer like a stop string, but nobody asked for: a chat template's end of a turn."""
    include_stop: bool = False
    """Keep the stop string, or the text of the stop token, in the output."""
    skip_special_tokens: bool = True
    min_tokens: int = 0
    """Stop strings are looked for in the text of the tokens after these."""
    stop_token_ids: frozenset[int] = frozenset()
    """Stop tokens that the caller asked for, which are reported as stop_reason; end-of-sequence tokens are not."""
    structure_param: str | None = None
    """The field that asks for a structure of the answer, for errors."""
    offsets: bool = False
    """Tell where in the text each token begins."""
    interval: int = 0
    """Tokens that a piece of a stream has at least, but for the first and the last; 0 for the server's number."""


class Piece(msgspec.Struct):
    """What a sequence has to tell since its last piece.

    Tokens and log-probabilities match one to one. The text may lag behind them while it could still turn out to be
    part of a stop string or of an unfinished character, and leaves out the stop string; the tokens end with the one
    that completed it.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    first: bool
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    is_shortened: bool = False
    """It ended as its structure wants, near max_tokens, where something was forbidden for which there was no time."""
    offsets: list[int] = []
    """Where the tokens begin in the text of the whole answer, in characters; if the options ask for it.

    At most the length of the text when the answer is one piece. In a stream a token may turn out later to belong to a
    stop string that is cut off.
    """


class WeightSpan(NamedTuple):
    """Tokens of an answer that were sampled by the same weights, up to where the next span begins."""

    first: int
    """The first of them, counted from 0."""
    version: str
    """What trainers call the weights."""


class Sequence:
    """One choice of one prompt. It ends when the engine says so or when a stop string is complete."""

    def __init__(self, index: int, request: NewRequest, output: OutputOptions, service: Service) -> None:
        self.index = index
        self.request = request
        self.id = ""
        """An id of its own, by which it can be aborted, if the request brought one."""
        self.on_whole: Callable[[], None] = lambda: None
        """Called when it has come to its end by itself."""
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.embedding = b""
        """float32, once it has ended, if the request asked for one."""
        self.finished = False
        self.finish_reason: FinishReason | None = None
        self._output = output
        self._interval = output.interval or service.config.stream_interval
        self._service = service
        self.metrics = SequenceMetrics(service.metrics, request.arrival, len(request.prompt), request.offline)
        detokenizer = IncrementalDetokenizer(service.text.tokenizer, output.skip_special_tokens, request.prompt)
        self._offsets = OffsetDetokenizer(detokenizer) if output.offsets else None
        self._detokenizer = detokenizer if self._offsets is None else self._offsets
        self._num_characters = 0
        stops = output.stop + output.end_texts
        self._stop = StopChecker(stops, output.include_stop) if stops else None
        self._first = True
        self._spans: list[tuple[int, Called]] = []
        """First token, and what the weights were called that sampled it and those after it."""
        self._num_arrived = 0
        self._stream: RequestStream

    @property
    def prompt(self) -> list[int]:
        return self.request.prompt

    @property
    def has_begun(self) -> bool:
        """Whether it waits no more."""
        return self.metrics.scheduled > 0 or self.finished

    def attach(self, stream: RequestStream) -> None:
        self._stream = stream
        stream.on_delta, stream.on_last = self._arrived, self.metrics.on_last

    @property
    def weight_spans(self) -> list[WeightSpan]:
        """Which weights sampled the tokens so far, in order; one span unless they were updated meanwhile."""
        return [WeightSpan(first, called.name) for first, called in self._spans if first < self.num_tokens]

    @property
    def weight_version(self) -> str:
        """That which sampled the last token so far; the one that serves now if there is none."""
        return spans[-1].version if (spans := self.weight_spans) else self._service.control.weight_version

    async def next(self) -> Piece:
        """What the deltas that have arrived add up to: ``interval`` tokens or more, but for the first and the last."""
        return await self._next(0 if self._first else self._interval)

    async def rest(self) -> Piece:
        """Everything up to the end, as one piece."""
        whole = await self._next(ALL)
        whole.offsets = [min(offset, self._num_characters) for offset in whole.offsets]
        return whole

    async def _next(self, least: int) -> Piece:
        # Where stop strings are looked for, each token is: the engine is to stop at once.
        whole = self._push(await self._stream.next(least if self._stop is None else 0))
        while not self.finished and len(whole.tokens) < least:
            piece = self._push(await self._stream.next())
            whole.text += piece.text
            whole.tokens += piece.tokens
            whole.logprobs += piece.logprobs
            whole.offsets += piece.offsets
            whole.finish_reason = piece.finish_reason
            whole.stop_reason, whole.is_shortened = piece.stop_reason, piece.is_shortened
        return whole

    def end(self) -> None:
        """Stops the engine's work on this sequence if it has not ended."""
        if not self.finished:
            self._stream.abort()
            self._finish("abort")

    def _finish(self, reason: FinishReason) -> None:
        self.finished, self.finish_reason = True, reason
        self._stream.on_delta = None  # what comes after a stop string does not count
        self.metrics.on_end(reason)

    def _arrived(self, delta: TokenDelta) -> None:
        self.metrics.on_delta(delta)
        called = self._service.control.called(delta.target_version)
        if delta.tokens and (not self._spans or self._spans[-1][1] is not called):
            self._spans.append((self._num_arrived, called))
        self._num_arrived += len(delta.tokens)

    def _push(self, deltas: list[TokenDelta]) -> Piece:
        if len(deltas) == 1 and deltas[0].logprobs is None:
            tokens, logprobs = deltas[0].tokens, []
        else:
            tokens = [token for delta in deltas for token in delta.tokens]
            logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        piece = Piece("", tokens, logprobs, self._first)
        if self._first:
            self._first = False
            self.prompt_logprobs = deltas[0].prompt_logprobs or []
            self.num_cached_tokens = deltas[0].num_cached_tokens
        last = deltas[-1]
        if last.finish_reason is not None:
            self.embedding = last.embedding
            self._end_of_engine(piece, last)
        self._add_text(piece, has_text=tokens[:-1] if self._drops_last(last) else tokens)
        self.num_tokens += len(piece.tokens)
        self._num_characters += len(piece.text)
        if self._offsets is not None:
            self._locate(piece, self._offsets)
        if piece.finish_reason is not None:
            self._finish(piece.finish_reason)
            if piece.finish_reason != "abort":
                self.on_whole()
        return piece

    def _locate(self, piece: Piece, offsets: OffsetDetokenizer) -> None:
        piece.offsets = offsets.take()
        piece.offsets += [offsets.end] * (len(piece.tokens) - len(piece.offsets))  # a stop token is not shown
        if piece.finish_reason is not None:
            piece.offsets = [min(offset, self._num_characters) for offset in piece.offsets]

    def _drops_last(self, last: TokenDelta) -> bool:
        return last.stop_token is not None and not self._output.include_stop

    def _end_of_engine(self, piece: Piece, last: TokenDelta) -> None:
        """Takes over why the engine ended the sequence.

        Raises:
            InvalidRequestError: what the request asks for cannot be done.
            GenerationFailedError: because of another error.
            UnavailableError: because the engine died or the server is shutting down: half an answer must not look like
                a whole one.
        """
        if self._stream.lost:
            self._finish(last.finish_reason or "error")
            raise self._service.engine_gone(last.error or "the engine ended")
        if last.finish_reason == "error":
            self._finish("error")
            if last.is_refused:
                raise InvalidRequestError(last.error or "it cannot be done", param=self._output.structure_param)
            raise GenerationFailedError(last.error or "the engine failed this request")
        piece.finish_reason = last.finish_reason
        if last.stop_token in self._output.stop_token_ids:
            piece.stop_reason = last.stop_token
        elif last.is_shortened:
            piece.stop_reason, piece.is_shortened = SHORTENED, True

    def _add_text(self, piece: Piece, has_text: list[int]) -> None:
        ended = piece.finish_reason is not None
        if self._stop is None:
            piece.text = self._detokenizer.push(has_text)
            if ended:
                piece.text += self._detokenizer.finish()
            return
        for position, token in enumerate(has_text):
            text = self._detokenizer.push((token,))
            if self.num_tokens + position < self._output.min_tokens:
                piece.text += text
                continue
            piece.text += self._stop.push(text)
            if self._stop.matched is not None:
                del piece.tokens[position + 1 :]
                del piece.logprobs[position + 1 :]
                self._end_by_stop_string(piece)
                return
        if ended:
            piece.text += self._stop.push(self._detokenizer.finish())
            if self._stop.matched is not None:
                self._end_by_stop_string(piece)
            piece.text += self._stop.finish()

    def _end_by_stop_string(self, piece: Piece) -> None:
        assert self._stop is not None
        piece.finish_reason, piece.is_shortened = "stop", False
        piece.stop_reason = self._stop.matched if self._stop.matched in self._output.stop else None
        self._stream.abort(stopped=True)


class Generation:
    """Used as a context manager: entering submits the sequences, leaving stops those that have not ended."""

    def __init__(
        self,
        service: Service,
        name: str,
        arrival: float,
        sequences: list[Sequence],
        choices: int,
        request_id: str = "",
        rollout: Rollout | None = None,
    ) -> None:
        """``sequences`` are in the order prompt, choice; ``choices`` of them belong to each prompt.

        It can be aborted by its ``name``, which is that of the answer, and by the ``request_id``.
        """
        self.account = service.keys.anonymous.account
        """Whose limits it counts for."""
        self.timeout_s: float | None = None
        """How long its sender would wait for it."""
        self.name = name
        self.rollout = rollout
        self._request_id = request_id or name
        self._opened = ExitStack()
        self.arrival = arrival
        self.sequences = sequences
        self._choices = choices
        self._service = service
        self._pumps: list[asyncio.Task[None]] = []
        self._ready: list[tuple[Sequence, Piece]] = []
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        streams = self._service.submit([sequence.request for sequence in self.sequences], self.account)
        for sequence, stream in zip(self.sequences, streams, strict=True):
            sequence.attach(stream)
        self._open()
        metrics = self._service.metrics
        metrics.choices.observe(self._choices)
        metrics.max_tokens.observe(self.sequences[0].request.params.max_tokens)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()
        for pump in self._pumps:
            pump.cancel()
        for sequence in self.sequences:
            sequence.end()
            self._service.ended(sequence.request, sequence.metrics)
        self._service.metrics.max_generation_tokens.observe(max(sequence.num_tokens for sequence in self.sequences))

    def _open(self) -> None:
        prompt_tokens, _, _ = self.count_tokens()
        self._opened.enter_context(self._service.admission.holding(self.account, self.sequences, prompt_tokens))
        self._opened.enter_context(self._service.adapters.holding(self.sequences))
        opened = self._service.control.opened
        ids = [sequence.request.request_id for sequence in self.sequences]
        self._opened.enter_context(opened(ids, {self.name, self._request_id}))
        for sequence in self.sequences:
            if sequence.id:
                self._opened.enter_context(opened([sequence.request.request_id], [sequence.id]))
        if (rollout := self.rollout) is not None:
            name = self.sequences[0].request.tenant, rollout.group or self._request_id
            members = {f"{self._request_id}-{each.index}": each for each in self.sequences}
            numbers = {member: each.request.request_id for member, each in members.items()}
            ended = self._opened.enter_context(self._service.control.groups.joined(name, rollout.enough, numbers))
            for member, sequence in members.items():
                sequence.on_whole = partial(ended, member)

    @property
    def finished(self) -> bool:
        return not self._ready and all(sequence.finished for sequence in self.sequences)

    async def next(self) -> list[tuple[Sequence, Piece]]:
        """The pieces that are ready, at least one. Must not be called once ``finished``."""
        if len(self.sequences) == 1:
            sequence = self.sequences[0]
            return [(sequence, await sequence.next())]
        if not self._pumps:
            self._pumps = [asyncio.create_task(self._pump(sequence)) for sequence in self.sequences]
        await self._wake.wait()
        self._wake.clear()
        if self._failure is not None:
            raise self._failure
        ready, self._ready = self._ready, []
        return ready

    async def collect(self) -> list[Piece]:
        """Every sequence's whole output, in their order."""
        if len(self.sequences) == 1:
            return [await self.sequences[0].rest()]
        try:
            async with asyncio.TaskGroup() as group:
                answers = [group.create_task(sequence.rest()) for sequence in self.sequences]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [answer.result() for answer in answers]

    def count_tokens(self) -> tuple[int, int, int]:
        """Prompt tokens, those of them found in the prefix cache, and generated tokens so far.

        A prompt counts once however many choices it has.
        """
        prompts = [
            self.sequences[start : start + self._choices] for start in range(0, len(self.sequences), self._choices)
        ]
        return (
            sum(len(prompt[0].prompt) for prompt in prompts),
            sum(min(sequence.num_cached_tokens for sequence in prompt) for prompt in prompts),
            sum(sequence.num_tokens for sequence in self.sequences),
        )

    def metrics(self) -> dict[str, Any]:
        """What the sequences took, in the shape that others use too; milliseconds."""
        return sequences_metrics([sequence.metrics for sequence in self.sequences])

    async def _pump(self, sequence: Sequence) -> None:
        """All pumps of one engine step run in the same turn of the event loop, so ``next`` sees the step as a whole."""
        try:
            while not sequence.finished:
                piece = await sequence.next()
                self._ready.append((sequence, piece))
                self._wake.set()
        except Exception as error:
            self._failure = error
            self._wake.set()
