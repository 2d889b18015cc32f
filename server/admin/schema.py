"""The bodies of the admin API."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from slipstream.engine.operations import PauseMode, UpdateMode
from slipstream.server.body import Body

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
    action: Literal["pause", "resume", "train"]


class EmptyBody(Body):
    """Nothing is to be said."""


class PauseBody(Body):
    mode: PauseMode = "keep"


class UpdateBody(Body):
    version: Annotated[int, Field(ge=1, lt=2**31)]


class BeginBody(UpdateBody):
    mode: UpdateMode = "recompute"


class ReadBody(UpdateBody):
    path: Path


class PurgeBody(Body):
    tenant: Text | None = None
    all: bool | None = None
