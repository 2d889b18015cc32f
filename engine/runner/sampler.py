"""Draws the next token of each row and reports log-probabilities, as each request's parameters say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.engine.messages import SamplingParams, TokenLogprobs
from slipstream.kernels import ops
from slipstream.kernels.random import uniform

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot carry."""
NOT_FINITE = "the model returned logits that are not finite"
NOTHING_ALLOWED = "the request's constraints leave no token to generate"


@dataclass(slots=True)
class SamplingRow:
    """What one row is drawn with: parameters, and the tokens before it."""

    params: SamplingParams
    seed: int
    num_prompt: int
    history: NDArray[np.int32]
    """Prompt and output before the token to be drawn; a view that is valid for this call."""

    @property
    def num_output(self) -> int:
        return len(self.history) - self.num_prompt


@dataclass(slots=True)
class Sampled:
    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


def is_plain(params: SamplingParams) -> bool:
    """Whether the logits are used as they come: no processor changes or reports anything."""
    return (
        params.frequency_penalty == 0.0
        and params.presence_penalty == 0.0
        and params.repetition_penalty == 1.0
        and not params.logit_bias
        and not params.allowed_token_ids
        and not params.bad_words
        and params.min_tokens == 0
    )


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
    """Draws one token per row of logits [len(rows), vocab] float32, which is overwritten.

    Randomness comes from each row's seed and the number of tokens drawn before, so the result of a row does not
    depend on the other rows.
    """
    raw = [i for i, row in enumerate(rows) if row.params.logprobs is not None and row.params.logprobs_mode == "raw"]
    raw_logits = logits[raw] if raw else None
    for i, row in enumerate(rows):
        if not is_plain(row.params):
            process(logits, i, row)

    tokens: list[int] = ops.argmax(logits).tolist()
    errors = {i: _no_token(logits[i]) for i, token in enumerate(tokens) if token < 0}
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0 and i not in errors]
    probs: Tensor | None = None
    if drawn:
        probs = distribution(logits if len(drawn) == len(rows) else logits[drawn], [rows[i].params for i in drawn])
        seeds = np.array([rows[i].seed for i in drawn], np.uint64)
        counters = np.array([rows[i].num_output for i in drawn], np.uint64)
        uniforms = torch.from_numpy(uniform(seeds, counters)).to(logits.device)
        for i, token in zip(drawn, ops.draw(probs, uniforms).tolist(), strict=True):
            tokens[i] = token
    result = Sampled(tokens, errors=errors)
    if raw_logits is not None:
        for i, logprobs in zip(raw, raw_logits.log_softmax(-1), strict=True):
            _report(result, i, logprobs, rows)
    place = {i: at for at, i in enumerate(drawn)}
    for i, row in enumerate(rows):
        if row.params.logprobs is not None and row.params.logprobs_mode == "processed":
            if probs is not None and i in place:
                row_probs = probs[place[i]]
                logprobs = (row_probs / row_probs.sum()).log()
            else:
                logprobs = logits[i].log_softmax(-1)
            _report(result, i, logprobs, rows)
    return result


def sample_apart(logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
    """As ``sample``, one row after the other: an exception is the error of the row that raised it."""
    result = Sampled([])
    for i, row in enumerate(rows):
        try:
            alone = sample(logits[i : i + 1], [row])
        except Exception as error:
            alone = Sampled([-1], errors={0: failure(error)})
        result.tokens += alone.tokens
        if 0 in alone.logprobs:
            result.logprobs[i] = alone.logprobs[0]
        if 0 in alone.errors:
            result.errors[i] = alone.errors[0]
    return result


def failure(error: Exception) -> str:
    """What the request is told that raised it."""
    return f"the request could not be computed: {type(error).__name__}: {error}"


def process(logits: Tensor, i: int, row: SamplingRow) -> None:
    """Applies to row i, in place, everything that comes before temperature."""
    params = row.params
    if params.allowed_token_ids:
        allowed = torch.tensor(params.allowed_token_ids, device=logits.device)
        kept = logits[i, allowed]
        logits[i] = ops.NEVER
        logits[i, allowed] = kept
    for word in params.bad_words:
        head = len(word) - 1
        if row.num_output >= head and row.history[len(row.history) - head :].tolist() == list(word[:-1]):
            logits[i, word[-1]] = ops.NEVER
    if row.num_output < params.min_tokens and params.stop_token_ids:
        logits[i, list(params.stop_token_ids)] = ops.NEVER
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[i, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty:
        drawn, counts = np.unique(row.history[row.num_prompt :], return_counts=True)
        ops.penalize(
            logits,
            i,
            torch.from_numpy(np.unique(row.history)).to(logits.device, torch.long),
            params.repetition_penalty,
            torch.from_numpy(drawn).to(logits.device, torch.long),
            torch.from_numpy(counts).to(logits.device, torch.float32),
            params.frequency_penalty,
            params.presence_penalty,
        )


def distribution(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What a token is drawn from, one row per entry of ``params``, up to a factor per row; may overwrite logits."""

    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([getattr(entry, name) for entry in params], dtype=dtype, device=logits.device)

    return ops.distribution(
        logits, column("temperature"), column("top_k", torch.int32), column("min_p"), column("top_p")
    )


def token_logprobs(logprobs: Tensor, token: int, count: int) -> TokenLogprobs:
    """Of one token and the ``count`` most likely ones, from logprobs [vocab].

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
    return TokenLogprobs(token, max(float(value), LOWEST_LOGPROB), rank, top)


def most_likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each row of logits: ids [rows, count] int32 and log-probabilities [rows, count] float16, best first."""
    best = logits.topk(min(count, logits.shape[1]))
    return best.indices.int(), (best.values - logits.logsumexp(-1, keepdim=True)).half()


def _report(result: Sampled, i: int, logprobs: Tensor, rows: Sequence[SamplingRow]) -> None:
    if i not in result.errors:
        result.logprobs[i] = token_logprobs(logprobs, result.tokens[i], rows[i].params.logprobs or 0)


def _no_token(logits: Tensor) -> str:
    """Why none of these can be drawn."""
    return NOTHING_ALLOWED if bool((logits == ops.NEVER).all()) else NOT_FINITE
