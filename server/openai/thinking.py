"""The fields by which clients switch on or off what a model thinks before it answers, and how much of it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body
from slipstream.server.preparing.prepared import Limits
from slipstream.server.tools import reasoning

SWITCH, LEVEL = "enable_thinking", "reasoning_effort"
"""What chat templates call them."""


class ThinkingSwitch(Body):
    type: Literal["enabled", "disabled"]
    budget_tokens: int | None = Field(None, ge=1)
    """Accepted: how long it thinks is the model's choice."""


class ThinkingFields(Body):
    """Each vendor has its own."""

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    enable_thinking: bool | None = None
    think: bool | None = None
    thinking: ThinkingSwitch | None = None


def thinking_variables(limits: Limits, body: ThinkingFields, template: str) -> dict[str, Any]:
    """What a chat template is told of it. Where it has no levels, any of them but none means that the model thinks.

    Raises InvalidRequestError where that would not bring what is asked for, or the fields contradict each other.
    """
    effort = body.reasoning_effort
    said = {"enable_thinking": body.enable_thinking, "think": body.think}
    said["thinking"] = None if body.thinking is None else body.thinking.type == "enabled"
    said["reasoning_effort"] = False if effort == "none" else None if effort is None else True
    wanted = {name: value for name, value in said.items() if value is not None}
    if len(set(wanted.values())) > 1:
        raise InvalidRequestError(f"{' and '.join(wanted)} contradict each other", param=next(iter(wanted)))
    is_marked = (
        reasoning.recognized(template) if limits.reasoning_parser == "auto" else limits.reasoning_parser != "none"
    )
    has_levels = LEVEL in template
    for name, value in wanted.items():
        if value and SWITCH not in template and not is_marked and not (name == LEVEL and has_levels):
            raise unsupported(name, "the chat template of this model knows of no thinking")
    found: dict[str, Any] = {LEVEL: effort} if wanted.get(LEVEL) and has_levels else {}
    return found | ({SWITCH: next(iter(wanted.values()))} if wanted and SWITCH in template else {})


def unsupported(param: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param}: {message}", param=param, code="unsupported_parameter")
