"""The bodies of /v1/responses. What each field does is listed in docs/responses.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body
from slipstream.server.openai.fields import Arguments, kind_of_stop, refusal_as_text, unsupported
from slipstream.server.openai.message import Label
from slipstream.server.openai.schema import MAX_MESSAGES, MAX_METADATA, ChatMaxTokens, RequestId, StreamOptions
from slipstream.server.openai.structured import Schema
from slipstream.server.openai.translated import ExtraFields

MAX_TOOLS = 256
LOGPROBS = "message.output_text.logprobs"
INCLUDED = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
)
"""What may be asked for besides. There is nothing of it here but the first: reasoning comes as it is, and answers have
no calls of these tools."""


class ItemPart(Body):
    """Part of a message, of what a tool gave back, or of reasoning."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None
    """What the OpenAI client has made of the text; it sends it back."""
    prompt_cache_breakpoint: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_refusal(cls, part: Any) -> Any:
        return refusal_as_text(part, "output_text")


Text = Annotated[
    Annotated[str, Tag("a text")]
    | Annotated[
        Annotated[list[ItemPart], Field(max_length=MAX_MESSAGES, fail_fast=True)],
        Tag("a list"),
    ],
    Discriminator(kind_of_stop),
]


ItemType = Literal[
    "message",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "reasoning",
    "item_reference",
]


class Item(Body):
    """What the input consists of: a message, a call of a tool, what it gave back, reasoning, or one of these that is
    kept, by its id."""

    type: ItemType | None = None
    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    phase: str | None = None
    content: Text | None = None
    call_id: Label | None = None
    name: Label | None = None
    namespace: Label | None = None
    arguments: Arguments | None = None
    input: str | None = None
    parsed_arguments: Any = None
    output: Text | None = None
    summary: list[ItemPart] | None = Field(None, max_length=MAX_MESSAGES, fail_fast=True)
    encrypted_content: unsupported() = None  # type: ignore[valid-type]


Items = Annotated[list[Item], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class TextFormat(Body):
    """What the text of an answer is to look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: unsupported("medium") = None  # type: ignore[valid-type]


Summary = Literal["auto", "concise", "detailed"]


class ReasoningOptions(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    # Accepted: an answer has the reasoning itself, whole.
    summary: Summary | None = None
    generate_summary: Summary | None = None


class PromptFields(ExtraFields):
    """What becomes the prompt."""

    model: str | None = None
    input: Annotated[
        Annotated[str, Tag("a text")] | Annotated[Items, Tag("a list")],
        Discriminator(kind_of_stop),
    ]
    instructions: str | None = None
    previous_response_id: Label | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None

    # Refused unless off.
    conversation: unsupported() = None  # type: ignore[valid-type]
    context_management: unsupported([]) = None  # type: ignore[valid-type]
    prompt: unsupported() = None  # type: ignore[valid-type]


class CountInputTokensBody(PromptFields):
    pass


class RespondBody(PromptFields):
    max_output_tokens: ChatMaxTokens | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: dict[str, Any] | None = Field(None, max_length=MAX_METADATA)
    user: Label | None = None
    request_id: RequestId | None = None

    include: list[str] | None = Field(None, max_length=MAX_TOOLS)
    top_logprobs: int | None = Field(None, ge=-1, lt=2**31)

    # Accepted: they cannot change the answer.
    max_tool_calls: int | None = Field(None, ge=1)
    service_tier: str | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    client_metadata: dict[str, Any] | None = Field(None, max_length=MAX_METADATA)
    session_id: str | None = None

    # Refused unless off.
    moderation: unsupported() = None  # type: ignore[valid-type]
    image: unsupported() = None  # type: ignore[valid-type]
    access_programs: unsupported() = None  # type: ignore[valid-type]
    background_options: unsupported() = None  # type: ignore[valid-type]

    @property
    def wants_logprobs(self) -> bool:
        """A number of alternatives asks for them, too."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    @model_validator(mode="after")
    def _check(self) -> RespondBody:
        if self.max_output_tokens == 0:
            raise InvalidRequestError(
                "max_output_tokens: at least one token must be asked for", param="max_output_tokens"
            )
        if self.background and self.store is False:
            raise InvalidRequestError("background needs store: true, or nobody could fetch the answer", param="store")
        if unknown := [name for name in self.include or () if name not in INCLUDED]:
            raise InvalidRequestError(
                f"include: only {', '.join(INCLUDED)} are accepted, not {unknown[0][:60]!r}",
                param="include",
                code="unsupported_parameter",
            )
        return self


class CancelResponseBody(Body):
    """No fields."""


BODIES: tuple[type[Body], ...] = (RespondBody, CountInputTokensBody, CancelResponseBody)
