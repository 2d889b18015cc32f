"""The bodies of the admin API."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from slipstream.engine.operations import MemoryTag, PauseMode, UpdateMode
from slipstream.server.http.body import Body

NO_NUL = r"^[^\x00]*$"
"""What the operating system takes as an argument of a command."""
Text = Annotated[str, Field(max_length=1000, pattern=NO_NUL)]
Path = Annotated[str, Field(min_length=1, max_length=4096, pattern=NO_NUL)]
"""A path on the server."""


class ReasonBody(Body):
    """Kept in the history."""

    reason: Text | None = None


class PruneBody(ReasonBody):
    keep: Annotated[int, Field(ge=0, lt=2**31)]
    route: Text | None = None


class ImportBody(Body):
    folder: Path
    target: Path | None = None
    target_lineage: Text | None = None
    route: Text | None = None
    note: Text | None = None


class ExportBody(Body):
    version: Annotated[int, Field(ge=1, lt=2**31)]
    folder: Path


class EvolveBody(Body):
    action: Literal["pause", "resume", "train", "judge"]


class EmptyBody(Body):
    """Nothing is to be said."""


class PauseBody(Body):
    mode: PauseMode = "keep"


class UpdateBody(Body):
    version: Annotated[int, Field(ge=1, lt=2**31)]


class BeginBody(UpdateBody):
    mode: UpdateMode = "recompute"


class FinishBody(UpdateBody):
    keep_rest: bool = False
    checksums: dict[str, str] | None = None
    lora_scale: float | None = None


class SharedBody(UpdateBody):
    segment: Annotated[str, Field(min_length=1, max_length=255, pattern=NO_NUL)]
    num_bytes: Annotated[int, Field(ge=1, lt=2**50)]


class TensorBody(Body):
    """A tensor that is to come."""

    name: Text
    dtype: Annotated[str, Field(max_length=100)]
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**40)]], Field(max_length=8)]


class ReceiveBody(UpdateBody):
    group: Text
    tensors: list[TensorBody]
    buffer_bytes: Annotated[int, Field(ge=0, lt=2**62)] | None = None


class GroupBody(Body):
    name: Annotated[str, Field(min_length=1, max_length=200, pattern=NO_NUL)]


class JoinBody(GroupBody):
    address: Annotated[str, Field(min_length=1, max_length=255, pattern=NO_NUL)]
    port: Annotated[int, Field(ge=1, lt=2**16)]
    world_size: Annotated[int, Field(ge=2, lt=2**16)]
    rank: Annotated[int, Field(ge=1, lt=2**16)]
    backend: Literal["gloo", "nccl"] = "gloo"
    rendezvous: Literal["named", "stateless"] = "named"
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 120.0


class SleepBody(Body):
    tags: Annotated[list[MemoryTag], Field(min_length=1, max_length=2)] | None = None
    keep_weights: bool = True
    mode: PauseMode = "abort"


class WakeBody(Body):
    tags: Annotated[list[MemoryTag], Field(min_length=1, max_length=2)] | None = None


class AbortBody(Body):
    ids: Annotated[list[Text], Field(max_length=10_000)] | None = None


class ReadBody(UpdateBody):
    path: Path


class PurgeBody(Body):
    tenant: Annotated[str, Field(max_length=1000)] | None = None
    """As requests name themselves, whatever characters that are."""
    all: bool | None = None
