"""What an engine can be told to do between two steps, each as a type that says what is answered."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

import msgspec

Answer = TypeVar("Answer")
UpdateMode = Literal["keep", "recompute", "abort"]
"""What becomes of open requests when the target's weights change. Keep: those that run go on with the keys and values
that the old weights made. Recompute: they are computed again from their tokens, with the new weights, and go on. Abort:
all end, with what they have said. Requests that have not begun are computed with the new weights in any case.
"""
PauseMode = Literal["keep", "recompute", "wait", "abort"]
"""What becomes of open requests in a pause. Keep: all stand still as they are. Recompute: they give up what was
computed of them and go back to the queue. Wait: those that have begun go on to their end. Abort: all end, with what
they have said.
"""


class Operation(msgspec.Struct, Generic[Answer], frozen=True, array_like=True):
    """Carried out by ``Engine.operate``, whose result is the answer."""


class SwapReport(msgspec.Struct, frozen=True, array_like=True, tag="swapped"):
    """A version drafts for a route now; what that took, in seconds."""

    version: int
    route: str
    prepare_seconds: float
    """Time from the request for the version until it was ready to be swapped in; steps went on meanwhile."""
    pause_seconds: float
    """Time in which no step could run."""


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


class Pause(Operation[None], frozen=True, array_like=True, tag="pause"):
    """No request begins from now on, and none goes on but as the mode says; new ones wait. Answered at once."""

    mode: PauseMode = "keep"


class Resume(Operation[None], frozen=True, array_like=True, tag="resume"):
    """Ends a pause; nothing where there is none."""


class BeginTargetUpdate(Operation[None], frozen=True, array_like=True, tag="begin_target_update"):
    """Other weights for the target are to come; an update that was not finished is given up.

    Until it is finished the old ones serve, and nothing of the new ones can be seen.
    """

    version: int
    """Deltas tell it of every token, and it names the update in what follows."""
    mode: UpdateMode = "recompute"


class FillTarget(Operation[None], frozen=True, array_like=True, tag="fill_target"):
    """Tensors of an update, or rows of them, in any order; every row of every tensor has to come once at least."""

    version: int
    tensors: bytes
    """A safetensors file: tensors by their Hugging Face names, in any number format."""
    first_rows: dict[str, int] = {}
    """The first row of each tensor that holds only a part of the rows."""


class ReadTarget(Operation[None], frozen=True, array_like=True, tag="read_target"):
    """Fills an update from a path: a safetensors file, a GGUF file, or a folder with a whole model. See FillTarget."""

    version: int
    path: str


class TargetUpdated(msgspec.Struct, frozen=True, array_like=True, tag="target_updated"):
    """A version of the target serves now; what that took, in seconds."""

    version: int
    prepare_seconds: float
    """Time since the update began; steps went on meanwhile."""
    pause_seconds: float
    """Time in which no step could run."""


class FinishTargetUpdate(Operation[TargetUpdated], frozen=True, array_like=True, tag="finish_target_update"):
    """The new weights serve from now on, all of them; fails, and leaves the old ones, if some have not come."""

    version: int


class CancelTargetUpdate(Operation[None], frozen=True, array_like=True, tag="cancel_target_update"):
    """Gives an update up; the old weights go on serving."""

    version: int


class UseVocabulary(Operation[None], frozen=True, array_like=True, tag="use_vocabulary"):
    """Tells what tokens stand for, which requests with grammars need."""

    tokens: list[bytes]
    """By token id: what it adds to a text that has begun; empty for tokens that stand for nothing."""
    special: list[int] = []
    """Tokens that stand for something else than text, such as its end."""


class CheckIntegrity(Operation[None], frozen=True, array_like=True, tag="check_integrity"):
    """Fails if blocks, slots or queues do not add up."""


class TellStepCosts(Operation[dict[int, float]], frozen=True, array_like=True, tag="step_costs"):
    """Answers with the seconds of a step by its tokens, with nothing to attend to."""


TargetOperation = BeginTargetUpdate | FillTarget | ReadTarget | FinishTargetUpdate | CancelTargetUpdate
AnyOperation = (
    SwapDrafter
    | DropDrafter
    | Pause
    | Resume
    | TargetOperation
    | ResetPrefixCache
    | UseVocabulary
    | CheckIntegrity
    | TellStepCosts
)
AnyAnswer = SwapReport | TargetUpdated | dict[int, float] | None
