"""Samples the next token of each row and reports log-probabilities, as each request's parameters say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.engine.errors import RequestError
from slipstream.engine.grammar import Mask
from slipstream.engine.messages import SamplingParams, TokenLogprobs
from slipstream.kernels import ops
from slipstream.kernels.batch import Int32
from slipstream.kernels.random import UInt64

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot carry."""
History = Callable[[int], NDArray[np.int32]]
"""Prompt and output before the token that row i of a batch samples; valid during the call."""
NO_HISTORY = np.empty(0, np.int32)
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
        numbers = self._temperature[slots], self._top_k[slots], self._min_p[slots], self._top_p[slots]
        return SamplingBatch(*numbers, self.seeds[slots], num_output, special, faults, history)


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
        """What drawing takes, with an entry per row that is drawn: rows, the four parameters, seeds and indices; see
        ``ops``."""
        at = self.random
        if not len(at):
            return ()
        parameters = self.temperature[at], self.top_k[at], self.min_p[at], self.top_p[at]
        return at, *parameters, self.seeds[at].view(np.int64), self.num_output[at].astype(np.int64)

    def alone(self, i: int) -> SamplingBatch:
        """Row i by itself."""
        rows = slice(i, i + 1)
        return SamplingBatch(
            *(self.temperature[rows], self.top_k[rows], self.min_p[rows], self.top_p[rows]),
            *(self.seeds[rows], self.num_output[rows]),
            {0: self.special[i]} if i in self.special else {},
            {0: self.faults[i]} if i in self.faults else {},
            lambda _: self.history(i),
            {0: self.masks[i]} if i in self.masks else {},
        )


@dataclass(slots=True)
class Sampled:
    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    """Those with errors that are what the request asks for."""


def is_plain(params: SamplingParams) -> bool:
    """Whether a token is just sampled from the logits as they come: no processor changes or reports anything."""
    return (
        params.logprobs is None
        and params.frequency_penalty == 0.0
        and params.presence_penalty == 0.0
        and params.repetition_penalty == 1.0
        and not params.logit_bias
        and not params.allowed_token_ids
        and not params.bad_words
        and params.min_tokens == 0
    )


def excludes(params: SamplingParams) -> bool:
    """Whether a request rules tokens out, so that none may be left."""
    return bool(params.allowed_token_ids or params.bad_words or params.logit_bias or params.min_tokens)


def sample(logits: Tensor, batch: SamplingBatch, columns: Sequence[Tensor] | None = None) -> Sampled:
    """Samples one token per row of logits [len(batch), vocab] float32, which is overwritten.

    The noise of a row's race belongs to its seed and the number of tokens sampled before, so the result of a row does
    not depend on the other rows. Raises where a row cannot be sampled; ``sample_apart`` finds out which.

    ``columns`` are the batch's, where the logits are, if they are there already. What is drawn comes back in one copy.
    """
    if batch.faults:
        raise next(iter(batch.faults.values()))
    reported = {i: params for i, params in batch.special.items() if params.logprobs is not None}
    raw = [i for i, params in reported.items() if params.logprobs_mode == "raw"]
    raw_logits = logits[raw] if raw else None
    if batch.masks:
        restrict(logits, batch.masks)
    for i, params in batch.special.items():
        process(logits, i, params, batch)
    emptied = {i: (logits[i] == ops.NEVER).all() for i, params in batch.special.items() if excludes(params)}

    best, probs = ops.argmax(logits), None
    if columns is None:
        columns = [torch.from_numpy(column).to(logits.device) for column in batch.columns]
    if columns:
        at, *parameters, seeds, indices = columns
        everywhere = len(at) == len(logits)
        probs = ops.distribution(logits if everywhere else logits[at], *parameters)
        likeliest, drawn = best if everywhere else best[at], ops.draw(probs, seeds, indices)
        drawn = torch.where(likeliest < 0, likeliest, drawn)  # a row without a likeliest token has none at all
        best = drawn if everywhere else best.index_copy(0, at.long(), drawn)
    tokens: list[int] = best.tolist()
    errors: dict[int, str] = {}
    if min(tokens) < 0:
        errors = {
            i: NOTHING_ALLOWED if i in emptied and bool(emptied[i]) else NOT_FINITE
            for i, token in enumerate(tokens)
            if token < 0
        }
    result = Sampled(tokens, errors=errors)
    if raw_logits is not None:
        for i, logprobs in zip(raw, raw_logits.log_softmax(-1), strict=True):
            _report(result, i, logprobs, reported[i])
    place = {i: at for at, i in enumerate(batch.random.tolist())} if len(raw) < len(reported) else {}
    for i, params in reported.items():
        if params.logprobs_mode == "processed":
            if probs is not None and i in place:
                row_probs = probs[place[i]]
                logprobs = (row_probs / row_probs.sum()).log()
            else:
                logprobs = logits[i].log_softmax(-1)
            _report(result, i, logprobs, params)
    return result


def sample_apart(logits: Tensor, batch: SamplingBatch) -> Sampled:
    """Samples one row after the other: an exception is the error of the row that raised it. See ``sample``."""
    result = Sampled([])
    for i in range(len(batch)):
        try:
            alone = sample(logits[i : i + 1], batch.alone(i))
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
        forbidden = cleared(torch.from_numpy(bits).to(logits.device))  # an eighth of the bytes travels
    forbidden = forbidden[:, : logits.shape[1]]
    if list(masks) == list(range(len(logits))):
        logits.masked_fill_(forbidden, ops.NEVER)
    else:
        rows = torch.tensor(list(masks), device=logits.device)
        logits[rows] = logits[rows].masked_fill(forbidden, ops.NEVER)


def cleared(bits: Tensor) -> Tensor:
    """Whether each bit of bytes [rows, bytes] is clear, the lowest of each byte first."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> places) & 1).view(len(bits), -1) == 0


def process(logits: Tensor, i: int, params: SamplingParams, batch: SamplingBatch) -> None:
    """Applies to row i of the batch, in place, everything that comes before temperature."""
    num_output = int(batch.num_output[i])
    penalizes = params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty
    history = batch.history(i) if penalizes or params.bad_words else NO_HISTORY
    if params.allowed_token_ids:
        allowed = torch.tensor(params.allowed_token_ids, device=logits.device)
        kept = logits[i, allowed]
        logits[i] = ops.NEVER
        logits[i, allowed] = kept
    for word in params.bad_words:
        head = len(word) - 1
        if num_output >= head and history[len(history) - head :].tolist() == list(word[:-1]):
            logits[i, word[-1]] = ops.NEVER
    if num_output < params.min_tokens and params.stop_token_ids and not params.grammar:
        logits[i, list(params.stop_token_ids)] = ops.NEVER
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[i, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if penalizes:
        output, counts = np.unique(history[len(history) - num_output :], return_counts=True)
        ops.penalize(
            logits,
            i,
            torch.from_numpy(np.unique(history)).to(logits.device, torch.long),
            params.repetition_penalty,
            torch.from_numpy(output).to(logits.device, torch.long),
            torch.from_numpy(counts).to(logits.device, torch.float32),
            params.frequency_penalty,
            params.presence_penalty,
        )


def token_logprobs(logprobs: Tensor, token: int, count: int, asked: Sequence[int] = ()) -> TokenLogprobs:
    """Log-probabilities of a token, of the ``count`` most likely and of those ``asked`` for; from logprobs [vocab].

    Raises ValueError if they are not numbers.
    """
    value = logprobs[token]
    if value.isnan():
        raise ValueError(NOT_FINITE)
    rank = int((logprobs > value).sum()) + 1
    top: list[tuple[int, float]] = []
    if count:
        best = logprobs.topk(min(count, len(logprobs)))
        values = best.values.clamp(min=LOWEST_LOGPROB).tolist()
        top = list(zip(best.indices.tolist(), values, strict=True))
    others = logprobs[list(asked)].clamp(min=LOWEST_LOGPROB).tolist() if asked else []
    return TokenLogprobs(token, max(float(value), LOWEST_LOGPROB), rank, top, others)


def most_likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens of each row of logits, best first.

    Ids [rows, count] int32 and log-probabilities [rows, count] float16.
    """
    best = logits.topk(min(count, logits.shape[1]))
    return best.indices.int(), (best.values - logits.logsumexp(-1, keepdim=True)).half()


def _report(result: Sampled, i: int, logprobs: Tensor, params: SamplingParams) -> None:
    if i not in result.errors:
        result.logprobs[i] = token_logprobs(logprobs, result.tokens[i], params.logprobs or 0, params.logprob_token_ids)
