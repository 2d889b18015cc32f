"""What a request may ask of the engine. The server checks it to tell the client, and the engine before it takes one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slipstream.engine.messages import NewRequest, SamplingParams

MOST = 2**31 - 1
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, MOST),
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 10.0),
    "max_tokens": (0, MOST),
    "min_tokens": (0, MOST),
    "prompt_logprobs_from": (0, MOST),
}
"""Ranges of numbers among the sampling parameters, both ends included: as wide as arithmetic on logits in float32 is
right."""
BIAS_RANGE = (-100.0, 100.0)
OPTIONAL_RANGES: dict[str, tuple[int, int]] = {
    "seed": (0, 2**64 - 1),
    "logprobs": (0, MOST),
    "prompt_logprobs": (0, MOST),
}


@dataclass(frozen=True, slots=True)
class ForeignToken:
    """A token id that the model does not have."""

    field: str
    """``prompt``, or the sampling parameter that holds it."""
    token: int


def foreign_token(prompts: Sequence[Sequence[int]], params: SamplingParams, vocab_size: int) -> ForeignToken | None:
    """The first token id that is none of 0 … vocab_size - 1, wherever requests can name tokens."""
    for field, tokens in _token_lists(prompts, params):
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            return ForeignToken(field, next(token for token in tokens if not 0 <= token < vocab_size))
    return None


def problem(request: NewRequest, vocab_size: int, max_model_len: int) -> str | None:
    """Why the engine cannot compute this request, or None if it can."""
    params, length = request.params, len(request.prompt)
    if not 0 < length <= max_model_len:
        return f"a prompt has 1 to {max_model_len} tokens, not {length}"
    if (foreign := foreign_token([request.prompt], params, vocab_size)) is not None:
        return f"{foreign.field}: the vocabulary has the tokens 0 to {vocab_size - 1}, not {foreign.token}"
    if not all(params.bad_words):
        return "bad_words: a word has no tokens"
    if params.grammar and not params.stop_token_ids:
        return "grammar: it needs stop tokens, of which one ends the output where the grammar does"
    for field, value, (low, high) in _numbers(params):
        if not low <= value <= high:  # NaN is in no range
            return f"{field}: from {low:g} to {high:g}, not {value}"
    if not -MOST <= request.priority <= MOST:
        return f"priority: from {-MOST} to {MOST}, not {request.priority}"
    return None


def _token_lists(prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[tuple[str, Sequence[int]]]:
    for prompt in prompts:
        yield "prompt", prompt
    yield "logit_bias", tuple(params.logit_bias)
    yield "allowed_token_ids", params.allowed_token_ids
    yield "stop_token_ids", params.stop_token_ids
    yield "logprob_token_ids", params.logprob_token_ids
    for word in params.bad_words:
        yield "bad_words", word


def _numbers(params: SamplingParams) -> Iterator[tuple[str, float, tuple[float, float]]]:
    for field, limits in RANGES.items():
        yield field, getattr(params, field), limits
    for field, limits in OPTIONAL_RANGES.items():
        if (value := getattr(params, field)) is not None:
            yield field, value, limits
    for token, bias in params.logit_bias.items():
        yield f"logit_bias.{token}", bias, BIAS_RANGE
