"""What preparing a request makes of it, in whatever dialect it came; and what those who prepare know of the server.

Nothing here imports more than the processes need that prepare large bodies.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from slipstream.server.errors import ModelNotFoundError
from slipstream.server.http.body import Body, shown
from slipstream.server.text import TurnEnds
from slipstream.server.tools.answer import Speech

Kind = TypeVar("Kind", bound=Body)


@dataclass(frozen=True)
class Limits:
    """What those who prepare requests must know of the server."""

    model_names: tuple[str, ...]
    max_model_len: int
    vocab_size: int
    max_prompts: int
    unknown_fields: Literal["error", "warn"]
    request_templates: Literal["refused", "elsewhere", "here"]
    """Whether a template in a request is used. Where it would run beside others' work, it is to run elsewhere."""
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    """The options of these names."""
    is_apart: bool = False
    """Whether this is a process that may end."""


@dataclass(frozen=True)
class Structure:
    """What an answer is to look like."""

    grammar: str
    """For the engine; see SamplingParams."""
    param: str
    """The field that asks for it, for errors."""
    ends_in_time: bool = True
    """Whether an answer that max_tokens would cut off comes to an end that matches; see SamplingParams."""


@dataclass(frozen=True)
class Prepared(Generic[Kind]):
    """A generating request."""

    body: Kind
    """The body without the fields that became the prompts."""
    prompts: list[list[int]]
    texts: list[str]
    """What the prompts were made of, where the answer is to repeat it."""
    ends: TurnEnds | None = None
    """How turns of a conversation end; None for a prompt."""
    structure: Structure | None = None
    speech: Speech | None = None
    """What is to be looked for in the answer; None: it is content as a whole."""

    def packed(self) -> Packed:
        prompts = [array("i", prompt) for prompt in self.prompts]
        return Packed(self.body, prompts, self.texts, self.ends, self.structure, self.speech)


@dataclass(frozen=True)
class Packed:
    """Prepared, in a form that takes no time to read, however many tokens there are."""

    body: Any
    prompts: list[array[int]]
    texts: list[str]
    ends: TurnEnds | None
    structure: Structure | None
    speech: Speech | None

    async def unpacked(self) -> Prepared[Any]:
        """Makes lists of the prompts; others have their turn between two of them."""
        prompts = []
        for prompt in self.prompts:
            prompts.append(prompt.tolist())
            await asyncio.sleep(0)
        return Prepared(self.body, prompts, self.texts, self.ends, self.structure, self.speech)


@dataclass(frozen=True)
class Answered:
    """A request that needs no engine, and what is answered."""

    model: str | None
    """What it calls the model: those who answer do not know all of its names."""
    data: bytes


class RunElsewhereError(Exception):
    """The request brings a template of its own, or a grammar that has to be tried."""


def require_model(names: Sequence[str], name: str | None) -> str:
    """The name to answer with; requests may leave it out, or name none (``""``), since there is only one model. Raises
    ModelNotFoundError."""
    if not name:
        return names[0]
    if name not in names:
        raise ModelNotFoundError(
            f"there is no model {shown(name)} here; this server has {', '.join(map(repr, names))}", param="model"
        )
    return name
