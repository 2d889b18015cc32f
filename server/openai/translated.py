"""Conversations that come in other dialects, as bodies of this one."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from slipstream.server.config import MAX_PRIORITY
from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body
from slipstream.server.openai.message import MAX_CALLS
from slipstream.server.openai.schema import MAX_MESSAGES, CacheSalt, ChatBody, Seed, Speculation, in_range


class ExtraFields(Body):
    """What this server takes beside the fields of another dialect, with the names and meanings that chat has for it."""

    temperature: float | None = in_range("temperature")
    top_p: float | None = in_range("top_p")
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = in_range("min_p")
    frequency_penalty: float | None = in_range("frequency_penalty")
    presence_penalty: float | None = in_range("presence_penalty")
    repetition_penalty: float | None = in_range("repetition_penalty")
    seed: Seed | None = None
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    cache_salt: CacheSalt | None = None
    speculation: Speculation | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def shared(self) -> dict[str, Any]:
        """These fields, for a body of chat."""
        return {name: value for name in ExtraFields.model_fields if (value := getattr(self, name)) is not None}


def chat_body(fields: dict[str, Any], param: str) -> ChatBody:
    """Raises InvalidRequestError; ``param`` is the field that the messages come from."""
    messages = fields["messages"]
    if len(messages) > MAX_MESSAGES or any(len(message.get("tool_calls") or ()) > MAX_CALLS for message in messages):
        raise InvalidRequestError(
            f"{param}: at most {MAX_MESSAGES} messages, with {MAX_CALLS} calls each, are taken", param=param
        )
    try:
        return ChatBody.model_validate(fields)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in detail["loc"])
        raise InvalidRequestError(f"{where}: {detail['msg']}", param=where) from None


def add_message(messages: list[dict[str, Any]], role: str, content: str) -> None:
    messages.append({"role": role, "content": content})


def open_assistant(messages: list[dict[str, Any]], begun: bool) -> dict[str, Any]:
    """The assistant's message that goes on: the last one if it was ``begun`` as such, else a new one."""
    if not begun:
        messages.append({"role": "assistant"})
    return messages[-1]
