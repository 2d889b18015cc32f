"""The answers of /v1/messages, as the OpenAPI document shows them. What they mean is in docs/messages.md."""

from __future__ import annotations

from typing import Any, Literal

from slipstream.server.http.description import Answer

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageBlock(Answer):
    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageUsage(Answer):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageProblemDetails(Answer):
    error_code: str


class MessageProblem(Answer):
    type: str
    message: str
    details: MessageProblemDetails | None = None


class MessageErrorAnswer(Answer):
    type: Literal["error"]
    error: MessageProblem
    request_id: str | None


class MessageDelta(Answer):
    type: Literal["text_delta", "thinking_delta", "input_json_delta"] | None = None
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None


class MessageEvent(Answer):
    """Which fields there are depends on the type."""

    type: str
    message: MessageAnswer | None = None
    index: int | None = None
    content_block: MessageBlock | None = None
    delta: MessageDelta | None = None
    usage: MessageUsage | None = None
    error: MessageProblem | None = None
    request_id: str | None = None


class MessageTokens(Answer):
    input_tokens: int


class MessageBatchCounts(Answer):
    processing: int
    succeeded: int
    errored: int
    canceled: int
    expired: int


class MessageBatchAnswer(Answer):
    id: str
    type: Literal["message_batch"]
    processing_status: Literal["in_progress", "canceling", "ended"]
    request_counts: MessageBatchCounts
    created_at: str
    expires_at: str
    ended_at: str | None
    cancel_initiated_at: str | None
    archived_at: None
    results_url: str | None


class MessageBatchPage(Answer):
    data: list[MessageBatchAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class MessageBatchDeleted(Answer):
    id: str
    type: Literal["message_batch_deleted"]


ANSWERS: tuple[type[Answer], ...] = (
    *(MessageAnswer, MessageEvent, MessageErrorAnswer, MessageTokens),
    *(MessageBatchAnswer, MessageBatchPage, MessageBatchDeleted),
)
