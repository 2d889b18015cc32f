"""The answers of the generating routes of this dialect, as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Any, Literal

from slipstream.server.http.description import Answer
from slipstream.server.openai.answers import ChatLogprobs, FinishReason, PromptLogprobs, Usage


class CandidateToken(Answer):
    token_id: int
    token: str
    logprob: float
    rank: int | None


class PositionLogprobs(CandidateToken):
    top_logprobs: list[CandidateToken]


class TokenIdLogprobs(Answer):
    content: list[PositionLogprobs]


class WeightVersionSpan(Answer):
    """The tokens from ``start`` up to ``end`` were sampled with the weights of this version."""

    version: str
    start: int
    end: int


class TokensOutChoice(Answer):
    index: int
    token_ids: list[int]
    text: str | None = None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    logprobs: TokenIdLogprobs | ChatLogprobs | None
    weight_versions: list[WeightVersionSpan] | None
    routed_experts: None
    sampling_mask: None


class TokensOutAnswer(Answer):
    request_id: str
    output_mode: Literal["tokens", "text"]
    model: str
    created: int
    choices: list[TokensOutChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None
    prompt_token_ids: list[int] | None


class TokensOutChunk(Answer):
    request_id: str
    output_mode: Literal["tokens", "text"]
    choices: list[TokensOutChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class Rendered(Answer):
    """A body for /inference/v1/generate."""

    request_id: str
    token_ids: list[int]
    token_offsets: None
    features: None
    content_parts: None
    sampling_params: dict[str, Any]
    model: str
    reasoning_ended: None
    reasoning_parser_kwargs: None
    return_token_ids: bool | None
    output_mode: Literal["tokens"]
    stream: bool
    stream_options: dict[str, Any] | None
    cache_salt: str | None
    priority: int
    kv_transfer_params: None
    ec_transfer_params: None


class TrlCompletions(Answer):
    """Lists by sequence, position and candidate; the prompts once each."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[list[float | None]]] | None
    logprob_token_ids: list[list[list[int]]] | None


class TrlScores(Answer):
    logprobs: list[list[list[float | None]]] | None = None
    logprob_token_ids: list[list[list[int]]] | None = None
    logprobs_b64: str | None = None
    token_ids_b64: str | None = None
    actual_logprobs_b64: str | None = None
    actual_token_ids_b64: str | None = None
    shape: list[int] | None = None
    completion_lengths: list[int] | None = None


class SessionFinished(Answer):
    status: Literal["ok"]


class ServerLoad(Answer):
    server_load: int


class TrlHealth(Answer):
    status: str
    reason: str | None = None


ANSWERS: tuple[type[Answer], ...] = (
    *(TokensOutAnswer, TokensOutChunk, Rendered, TrlCompletions, TrlScores, SessionFinished, ServerLoad, TrlHealth),
)
