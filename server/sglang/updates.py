"""Weights that come in buckets, of which nobody says which one is the last."""

from __future__ import annotations

from slipstream.engine.operations import UpdateMode
from slipstream.server.rollout.control import Control
from slipstream.server.sglang.control_schema import UpdateFields


class Updates:
    """Begins an update with its first bucket, and ends it when every tensor has come or when the trainer goes on.

    Until then the old weights serve, all of them.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._ours: int | None = None
        """The number of the update that buckets have come for."""

    async def prepare(self, asked: UpdateFields) -> UpdateMode:
        """What becomes of open requests when the new weights serve."""
        if asked.abort_all_requests:
            await self._control.abort()
            return "abort"
        return "keep" if asked.flush_cache is False else "recompute"

    def took_bucket(self) -> str:
        """What has happened, in words."""
        self._ours = self._control.updating_number
        if self._ours is None:
            return f"Weight version {self._control.weight_version} serves."
        return "The weights have come; they serve when all have, or when generation continues."

    async def begin(self) -> None:
        """Gives up what buckets have brought before: whoever begins has nothing to do with what another has left."""
        ours, self._ours = self._ours, None
        if self._control.updating is not None and self._control.updating_number == ours:
            await self._control.cancel_update()

    async def finish(self) -> str:
        """Ends the update for which buckets have come, if there is one; see Control.finish_what_came."""
        ours, self._ours = self._ours, None
        if self._control.updating_number in (None, ours):
            return await self._control.finish_what_came()
        return ""

    async def end(self) -> None:
        """The same for a trainer that says so: nobody has to be asked whether that was all."""
        ours, self._ours = self._ours, None
        if (name := self._control.updating) is None:
            await self._control.finish_what_came()
        elif self._control.updating_number == ours:
            await self._control.finish_update(name, keep_rest=True)
