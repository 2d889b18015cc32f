"""The bodies of /v1/messages. What each field does is listed in docs/messages.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag

from slipstream.server.batch.lines import MOST_ID_CHARS, MOST_LINES
from slipstream.server.http.body import Body
from slipstream.server.openai.fields import kind_of_stop, unsupported
from slipstream.server.openai.message import Label
from slipstream.server.openai.schema import (
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_STOP_STRINGS,
    RequestId,
    StopString,
)
from slipstream.server.openai.structured import Schema
from slipstream.server.openai.translated import ExtraFields

MAX_TOOLS = 256
NOTHING_FORGOTTEN: tuple[Any, ...] = (
    {},
    {"edits": []},
    {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
)
"""Ways to say that the whole conversation is to be read."""


class TextBlock(Body):
    """Text of the system or of what a tool gave back."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    citations: unsupported([]) = None  # type: ignore[valid-type]


Texts = Annotated[
    Annotated[str, Tag("a text")]
    | Annotated[Annotated[list[TextBlock], Field(max_length=MAX_MESSAGES, fail_fast=True)], Tag("a list")],
    Discriminator(kind_of_stop),
]


class ContentBlock(Body):
    """A block of a message: text, what was thought, the use of a tool, or its result."""

    type: Literal["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    """What was thought, for Anthropic's models alone to read."""
    id: Label | None = None
    name: Label | None = None
    input: dict[str, Any] | None = None
    caller: unsupported({"type": "direct"}) = None  # type: ignore[valid-type]
    tool_use_id: Label | None = None
    content: Texts | None = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None
    citations: unsupported([]) = None  # type: ignore[valid-type]
    parsed_output: Any = None
    """What the client has made of the text."""


class TurnBody(Body):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[str, Tag("a text")]
        | Annotated[Annotated[list[ContentBlock], Field(max_length=MAX_MESSAGES, fail_fast=True)], Tag("a list")],
        Discriminator(kind_of_stop),
    ]


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Label | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")
    name: str | None = None


class OutputConfig(Body):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class PromptFields(ExtraFields):
    """What becomes the prompt."""

    model: str | None = None
    messages: Annotated[list[TurnBody], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Texts | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None

    # Accepted: they cannot change the answer.
    cache_control: dict[str, Any] | None = None

    # Refused unless off.
    compaction: unsupported() = None  # type: ignore[valid-type]
    mcp_servers: unsupported([]) = None  # type: ignore[valid-type]
    context_management: unsupported(*NOTHING_FORGOTTEN) = None  # type: ignore[valid-type]
    speed: unsupported("standard") = None  # type: ignore[valid-type]
    thread: unsupported() = None  # type: ignore[valid-type]


class MessagesBody(PromptFields):
    max_tokens: int = Field(ge=1, lt=2**31)
    stop_sequences: list[StopString] | None = Field(None, max_length=MAX_STOP_STRINGS, fail_fast=True)
    stream: bool | None = None
    metadata: dict[str, Any] | None = Field(None, max_length=MAX_METADATA)
    request_id: RequestId | None = None

    # Accepted: they cannot change the answer.
    service_tier: str | None = None
    billing_policy: dict[str, Any] | None = None
    diagnostics: dict[str, Any] | None = None
    fallback_credit_token: str | dict[str, Any] | None = None
    fallbacks: str | list[dict[str, Any]] | None = None
    """Models for what the one that is asked declines; here none declines anything."""

    # Refused unless off.
    container: unsupported() = None  # type: ignore[valid-type]
    inference_geo: unsupported("global") = None  # type: ignore[valid-type]


class CountTokensBody(PromptFields):
    pass


class RequestOfBatch(Body):
    custom_id: Annotated[str, StringConstraints(min_length=1, max_length=MOST_ID_CHARS)]
    params: dict[str, Any]
    """A body of /v1/messages, which is read when its turn comes."""


class MessageBatchBody(Body):
    requests: Annotated[list[RequestOfBatch], Field(min_length=1, max_length=MOST_LINES, fail_fast=True)]


class CancelMessageBatchBody(Body):
    """No fields."""


BODIES: tuple[type[Body], ...] = (MessagesBody, CountTokensBody, MessageBatchBody, CancelMessageBatchBody)
