"""What an engine can be told to do between two steps, each as a type that says what is answered."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

Answer = TypeVar("Answer")


class Operation(msgspec.Struct, Generic[Answer], frozen=True, array_like=True):
    """Carried out by ``Engine.operate``, whose result is the answer."""


class SwapReport(msgspec.Struct, frozen=True, array_like=True, tag="swapped"):
    """A version drafts for a route now; what that took, in seconds."""

    version: int
    route: str
    prepare_seconds: float
    """From the request for it until it was ready to be swapped in; steps went on meanwhile."""
    pause_seconds: float
    """For which no step could run."""


class SwapDrafter(Operation[SwapReport], frozen=True, array_like=True, tag="swap_drafter"):
    """Lets the version in this folder draft for a route, at once if it is still in memory.

    The latest decision about a route counts: what was to be done before and is not done yet fails with SupersededError.
    """

    version: int
    route: str
    path: str


class DropDrafter(Operation[None], frozen=True, array_like=True, tag="drop_drafter"):
    """Requests of this route use the shared version from now on; without one, no learned drafter."""

    route: str


class ResetPrefixCache(Operation[None], frozen=True, array_like=True, tag="reset_prefix_cache"):
    """Nothing computed so far can be found again."""


class CheckIntegrity(Operation[None], frozen=True, array_like=True, tag="check_integrity"):
    """Fails if blocks, slots or queues do not add up."""


class TellStepCosts(Operation[dict[int, float]], frozen=True, array_like=True, tag="step_costs"):
    """Answers with the seconds of a step by its tokens, with nothing to attend to."""


AnyOperation = SwapDrafter | DropDrafter | ResetPrefixCache | CheckIntegrity | TellStepCosts
AnyAnswer = SwapReport | dict[int, float] | None
