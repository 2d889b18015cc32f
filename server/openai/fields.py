"""Kinds of fields of bodies."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo
from pydantic.functional_validators import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError


def unsupported(*off: Any) -> Any:
    """A field that only accepts null and the values that switch it off."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if value is None or any(type(value) is type(allowed) and value == allowed for allowed in off):
            return value
        hint = f"; only {', '.join(map(repr, off))} and null are accepted" if off else ""
        raise PydanticCustomError("unsupported", "not supported by this server{hint}", {"hint": hint})

    return Annotated[Any, AfterValidator(check)]


ALL_THAT_FIT = -1
"""As truncate_prompt_tokens: as many tokens as leave room for the answer."""


def _check_truncation(tokens: int) -> int:
    if not tokens:
        raise PydanticCustomError("truncation", "at least one token of the prompt must stay")
    return tokens


Truncation = Annotated[int, Field(ge=ALL_THAT_FIT, lt=2**31), AfterValidator(_check_truncation)]
"""How many tokens of a prompt are used, the last ones unless another side is asked for."""
Side = Literal["left", "right"]
"""What of a prompt that is too long goes."""


def kind_of_stop(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a text"


def _as_json(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


Arguments = Annotated[str, BeforeValidator(_as_json, str | dict[str, Any])]
"""Those of a call in the history: JSON as text, which is also given as the object itself."""


TEXT_KINDS = ("input_text", "output_text")
"""What parts that are texts are called in responses."""


def refusal_as_text(part: Any, kind: str) -> Any:
    """What an assistant said instead of an answer is a text as well, here of that kind of part."""
    if isinstance(part, dict) and part.get("type") == "refusal" and "refusal" in part:
        return {"type": kind, "text": part["refusal"]}
    return part


def part_as_text(part: Any) -> Any:
    """A part of a chat, which may be called as in responses; templates know ``text``."""
    if isinstance(part, dict) and part.get("type") in TEXT_KINDS:
        return part | {"type": "text"}
    return refusal_as_text(part, "text")


def _check_media(value: Any) -> Any:
    if value is None or (isinstance(value, list) and all(each in (None, []) for each in value)):
        return value
    hint = "; only null and lists of nothing are accepted"
    raise PydanticCustomError("unsupported", "not supported by this server{hint}", {"hint": hint})


NoMedia = Annotated[Any, AfterValidator(_check_media)]
"""Images and their kin, of which there may be none, for each prompt either."""
