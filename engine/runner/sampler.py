"""Samples the next token of each row and reports log-probabilities, as each request's parameters say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.engine.errors import RequestError
from slipstream.engine.grammars.endings import Mask
from slipstream.engine.messages import SamplingParams, TokenLogprobs
from slipstream.engine.runner.changes import NO_CHANGES, Changes, History, excludes, is_plain, reads_history
from slipstream.engine.runner.reported import report
from slipstream.kernels import ops
from slipstream.kernels.batch import Int32
from slipstream.kernels.random import UInt64
from slipstream.kernels.readback import Readback, sent

MODES = ("raw", "processed")
"""Kinds of log-probabilities, in the order in which they travel."""
NOT_FINITE = "the model returned logits that are not finite"
NOTHING_ALLOWED = "the request's constraints leave no token to generate"


class SamplingColumns:
    """Sampling parameters of the running requests: columns with an entry per slot, and each request's own for what
    only few of them ask for."""

    def __init__(self, slots: int) -> None:
        self.params = [SamplingParams(max_tokens=0)] * slots
        self.num_prompt = np.zeros(slots, np.int64)
        self.seeds = np.zeros(slots, np.uint64)
        self.is_special = np.zeros(slots, np.bool_)
        """Whether more is to be done than to sample from the model's distribution (``is_plain``)."""
        self.faults: dict[int, Exception] = {}
        """Slots whose parameters are no numbers that can be computed with, and why."""
        self._temperature = np.zeros(slots, np.float32)
        self._top_k = np.zeros(slots, np.int32)
        self._min_p = np.zeros(slots, np.float32)
        self._top_p = np.zeros(slots, np.float32)

    def enter(self, slot: int, params: SamplingParams, seed: int, num_prompt: int) -> None:
        """A request takes a row; whatever its parameters are, the others are not to notice."""
        self.params[slot] = params
        self.num_prompt[slot] = num_prompt
        self.is_special[slot] = not is_plain(params)
        self.faults.pop(slot, None)
        self._temperature[slot] = 0
        try:
            self.seeds[slot], self._top_k[slot] = seed, params.top_k
            with np.errstate(over="ignore"):
                self._min_p[slot], self._top_p[slot] = params.min_p, params.top_p
                if params.temperature > 0:  # as a float32 it could be 0, which is another way of sampling
                    self._temperature[slot] = max(params.temperature, ops.COLDEST)
        except OverflowError as error:
            self.faults[slot] = error

    def take(self, slots: Int32, lengths: Int32, history: History) -> SamplingBatch:
        """What to sample with, for rows of logits of these slots, each sampled after so many tokens (arrays [rows])."""
        num_output = lengths - self.num_prompt[slots]
        special: dict[int, SamplingParams] = {}
        if (is_special := self.is_special[slots]).any():
            special = {i: self.params[slots[i]] for i in is_special.nonzero()[0].tolist()}
        faults: dict[int, Exception] = {}
        if self.faults:
            faults = {i: self.faults[slot] for i, slot in enumerate(slots.tolist()) if slot in self.faults}
        return SamplingBatch(
            temperature=self._temperature[slots],
            top_k=self._top_k[slots],
            min_p=self._min_p[slots],
            top_p=self._top_p[slots],
            seeds=self.seeds[slots],
            num_output=num_output,
            special=special,
            faults=faults,
            history=history,
            changes=Changes.of(special, num_output, history, faults) if special else NO_CHANGES,
        )


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What rows of logits are sampled with. The arrays have an entry per row; the mappings only those that need one."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    min_p: NDArray[np.float32]
    top_p: NDArray[np.float32]
    seeds: UInt64
    num_output: NDArray[np.int64]
    """Tokens sampled before: the index of the token, to which its noise belongs."""
    special: Mapping[int, SamplingParams]
    """Rows with processors, or with log-probabilities to report."""
    faults: Mapping[int, Exception]
    history: History
    changes: Changes
    masks: Mapping[int, Mask] = field(default_factory=dict)
    """Rows that a grammar constrains, with what it allows."""

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def random(self) -> Int32:
        """Rows that are drawn; the others are greedy."""
        return self.temperature.nonzero()[0].astype(np.int32)

    @property
    def columns(self) -> tuple[NDArray[Any], ...]:
        """What sampling takes besides logits, as far as there is any: seven for drawing, with an entry per row that is
        drawn (rows, the four parameters, seeds and indices, see ``ops``); the changes'; the rows of either kind of
        log-probabilities."""
        found: tuple[NDArray[Any], ...] = ()
        if self.special:
            found = self.changes.columns(len(self))
            found += tuple(np.array(rows, np.int32) for mode in MODES if (rows := self.reported(mode)))
        if not len(at := self.random):
            return found
        parameters = self.temperature[at], self.top_k[at], self.min_p[at], self.top_p[at]
        return at, *parameters, self.seeds[at].view(np.int64), self.num_output[at].astype(np.int64), *found

    def reported(self, mode: str) -> list[int]:
        """Rows that want log-probabilities of this kind."""
        wanted = self.special.items()
        return [i for i, params in wanted if params.logprobs is not None and params.logprobs_mode == mode]

    @property
    def reads_history(self) -> bool:
        """Whether a row depends on what was sampled before in other ways than through the model."""
        return any(map(reads_history, self.special.values()))

    def excludes(self, i: int) -> bool:
        """Whether row i rules tokens out by itself, besides what a grammar does."""
        return i in self.special and excludes(self.special[i])

    def alone(self, i: int) -> SamplingBatch:
        """Row i by itself."""
        rows = slice(i, i + 1)
        return SamplingBatch(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            min_p=self.min_p[rows],
            top_p=self.top_p[rows],
            seeds=self.seeds[rows],
            num_output=self.num_output[rows],
            special={0: self.special[i]} if i in self.special else {},
            faults={0: self.faults[i]} if i in self.faults else {},
            history=lambda _: self.history(i),
            changes=self.changes.alone(i),
            masks={0: self.masks[i]} if i in self.masks else {},
        )


@dataclass(slots=True)
class Sampled:
    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    """Those with errors that are what the request asks for."""


@dataclass(slots=True)
class Sampling:
    """Tokens that the device samples, or has sampled."""

    tokens: Tensor
    """[rows] int64, on the device; less than 0 where there is none."""
    told: Tensor
    """What the host has to know of them: numbers [n], of which ``read`` makes what was sampled."""
    read: Callable[[NDArray[Any]], Sampled]
    _readback: Readback | None = None
    _besides: list[int] = field(default_factory=list)

    @classmethod
    def known(cls, sampled: Sampled, device: torch.device) -> Sampling:
        tokens = torch.tensor(sampled.tokens, device=device)
        return cls(tokens, tokens[:0].int(), lambda _: sampled)

    def send(self, besides: Sequence[Tensor] = ()) -> None:
        """Has it copied to the host, together with other int32, before anything that the device is given later."""
        self._besides = [each.numel() for each in besides]
        self._readback = Readback(torch.cat([self.told.int(), *map(torch.flatten, besides)]) if besides else self.told)

    def wait(self) -> tuple[Sampled, list[Int32]]:
        """What was sampled, once it is on the host, and what was sent besides, flat."""
        if self._readback is None:
            self.send()
        assert self._readback is not None
        told = self._readback.wait().numpy()
        own = len(told) - sum(self._besides)
        besides = np.split(told[own:], np.cumsum(self._besides)[:-1]) if self._besides else []
        return self.read(told[:own]), besides


def sample(logits: Tensor, batch: SamplingBatch, columns: Sequence[Tensor] | None = None) -> Sampling:
    """Samples one token per row of logits [len(batch), vocab] float32, which is overwritten.

    The noise of a row's race belongs to its seed and the number of tokens sampled before, so the result of a row does
    not depend on the other rows. Raises where a row cannot be sampled; ``sample_apart`` finds out which.

    ``columns`` are the batch's, where the logits are, if they are there already. Tokens come back in one copy.
    """
    if batch.faults:
        raise next(iter(batch.faults.values()))
    if columns is None:
        columns = [sent(column, logits.device) for column in batch.columns]
    left = iter(columns)

    def take(count: int) -> list[Tensor]:
        return list(islice(left, count))

    drawing = take(7) if len(batch.random) else []
    changes = take(8) if len(batch.changes.rows) else []
    allowed = take(2) if batch.changes.allowed else []
    raw, processed = (batch.reported(mode) for mode in MODES)
    at_raw, at_processed = take(1) if raw else [], take(1) if processed else []
    raw_logits = [logits[at.long()] for at in at_raw]
    if batch.masks:
        restrict(logits, batch.masks)
    if allowed:
        ops.allow_only(logits, *allowed)
    if changes:
        ops.change_logits(logits, *changes)

    best, probs = ops.argmax(logits), None
    if drawing:
        at, *parameters, seeds, indices = drawing
        everywhere = len(at) == len(logits)
        probs = ops.distribution(logits if everywhere else logits[at], *parameters)
        likeliest, drawn = best if everywhere else best[at], ops.draw(probs, seeds, indices)
        drawn = torch.where(likeliest < 0, likeliest, drawn)  # a row without a likeliest token has none at all
        best = drawn if everywhere else best.index_copy(0, at.long(), drawn)

    scores = raw_logits + [_processed(logits, probs, batch, processed) for _ in at_processed]
    parts, reads = [best.int()], []
    for rows, places, some in zip(filter(None, (raw, processed)), at_raw + at_processed, scores, strict=True):
        asked = [(batch.special[i].logprobs or 0, batch.special[i].logprob_token_ids) for i in rows]
        part, read = report(some, best[places.long()], asked)
        reads.append((rows, sum(map(len, parts)), read))
        parts.append(part)

    def read_all(told: NDArray[Any]) -> Sampled:
        tokens: list[int] = told[: len(batch)].tolist()
        result = Sampled(tokens)
        if min(tokens) < 0:
            result.errors = {
                i: NOTHING_ALLOWED if token == ops.NOTHING and batch.excludes(i) else NOT_FINITE
                for i, token in enumerate(tokens)
                if token < 0
            }
        for rows, begin, read in reads:
            for i, entry in zip(rows, read(told[begin:]), strict=True):
                if i not in result.errors:
                    if entry is None:
                        result.errors[i] = NOT_FINITE
                    else:
                        result.logprobs[i] = entry
        return result

    return Sampling(best, torch.cat(parts) if reads else best, read_all)


def _processed(logits: Tensor, probs: Tensor | None, batch: SamplingBatch, rows: list[int]) -> Tensor:
    """Logits of the distributions that these rows are sampled from, up to a constant [rows, vocab]."""
    place = {i: at for at, i in enumerate(batch.random.tolist())}
    drawn = [None if probs is None or i not in place else probs[place[i]].log() for i in rows]
    return torch.stack([logits[i] if one is None else one for i, one in zip(rows, drawn, strict=True)])


def sample_apart(logits: Tensor, batch: SamplingBatch) -> Sampled:
    """Samples one row after the other: an exception is the error of the row that raised it. See ``sample``."""
    result = Sampled([])
    for i in range(len(batch)):
        try:
            alone, _ = sample(logits[i : i + 1], batch.alone(i)).wait()
        except RequestError as error:
            alone = Sampled([-1], errors={0: str(error)}, refused={0})
        except Exception as error:
            alone = Sampled([-1], errors={0: failure(error)})
        result.tokens += alone.tokens
        if 0 in alone.logprobs:
            result.logprobs[i] = alone.logprobs[0]
        if 0 in alone.errors:
            result.errors[i] = alone.errors[0]
        result.refused |= {i} if alone.refused else set()
    return result


def failure(error: Exception) -> str:
    """What the request is told that raised it."""
    return f"the request could not be computed: {type(error).__name__}: {error}"


def restrict(logits: Tensor, masks: Mapping[int, Mask]) -> None:
    """Leaves rows of logits, in place, only what their masks allow."""
    bits = np.stack(list(masks.values()))
    if logits.device.type == "cpu":
        forbidden = torch.from_numpy(np.unpackbits(~bits, axis=1, bitorder="little").view(np.bool_))
    else:
        forbidden = cleared(sent(bits, logits.device))  # an eighth of the bytes travels
    forbidden = forbidden[:, : logits.shape[1]]
    if list(masks) == list(range(len(logits))):
        logits.masked_fill_(forbidden, ops.NEVER)
    else:
        rows = sent(np.array(list(masks)), logits.device)
        logits[rows] = logits[rows].masked_fill(forbidden, ops.NEVER)


def cleared(bits: Tensor) -> Tensor:
    """Whether each bit of bytes [rows, bytes] is clear, the lowest of each byte first."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> places) & 1).view(len(bits), -1) == 0


def most_likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens of each row of logits, best first.

    Ids [rows, count] int32 and log-probabilities [rows, count] float16.
    """
    nobody = torch.full((len(logits),), -1, dtype=torch.int32, device=logits.device)
    _, _, tokens, logprobs = ops.log_probabilities(logits, nobody, min(count, logits.shape[1]))
    return tokens, logprobs.half()
