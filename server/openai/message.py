"""A message of a conversation, and what is in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, WithJsonSchema, model_validator

from slipstream.server.http.body import Body
from slipstream.server.openai.fields import kind_of_stop, part_as_text, unsupported
from slipstream.server.openai.tools import CalledFunction, ToolCall

MAX_CALLS = 256
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Those of every conversation; a model's template may know more."""
Role = Annotated[
    str,
    Field(min_length=1, max_length=64),
    WithJsonSchema({"anyOf": [{"enum": list(ROLES)}, {"type": "string", "minLength": 1, "maxLength": 64}]}),
]
Label = Annotated[str, Field(max_length=512)]


class TextPart(Body):
    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_kind(cls, part: Any) -> Any:
        return part_as_text(part)


Content = Annotated[
    Annotated[str, Tag("a text")] | Annotated[Annotated[list[TextPart], Field(fail_fast=True)], Tag("a list")],
    Discriminator(kind_of_stop),
]


class ThinkingBlock(Body):
    """How LiteLLM keeps what an assistant thought, in Anthropic's form."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""
    signature: str | None = None
    data: str | None = None
    cache_control: dict[str, Any] | None = None


class Message(Body):
    role: Role
    type: Literal["text", "message"] | None = None
    """Accepted: lm-eval says it of messages in texts, others as in items of responses."""
    content: Content | None = None
    name: Label | None = None
    tool_call_id: Label | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """Another name of the same."""
    thinking_blocks: list[ThinkingBlock] | None = Field(None, max_length=MAX_CALLS, fail_fast=True)
    """The same again; a name above counts more."""
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_CALLS, fail_fast=True)
    function_call: CalledFunction | None = None
    audio: unsupported() = None  # type: ignore[valid-type]
    refusal: str | None = None
    """What an assistant said instead of an answer."""
    annotations: list[Any] | None = None
    parsed: Any = None
    """What the OpenAI client has made of the content."""
    provider_specific_fields: dict[str, Any] | None = None
    """What LiteLLM knows besides, and sends back."""
    cache_control: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _take_thinking(self) -> Message:
        thought = "".join(block.thinking for block in self.thinking_blocks or ())
        if thought and self.reasoning_content is None and self.reasoning is None:
            self.reasoning_content = thought
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""

    @property
    def calls(self) -> list[ToolCall]:
        """The calls of tools, by whichever name they came."""
        if self.function_call is not None:
            return [ToolCall(function=self.function_call)]
        return self.tool_calls or []
