"""What serves in an engine, for whoever trains it: its tensors, their checksums, and whether they have changed."""

from __future__ import annotations

from typing import Protocol

from slipstream.engine.errors import ConfigError, EngineDiedError, ModelError, SlipstreamError, SupersededError
from slipstream.engine.handle import EngineHandle
from slipstream.engine.messages import EngineStats
from slipstream.engine.operations import Answer, ChecksumTarget, Operation, ReadTensor, TensorRows
from slipstream.server.errors import ApiError, ConflictError, InvalidRequestError, UnavailableError


class Host(Protocol):
    """What control needs of the server."""

    @property
    def engine(self) -> EngineHandle: ...

    def require_ready(self) -> None:
        """Raises UnavailableError unless requests are taken."""

    def engine_gone(self, reason: str) -> UnavailableError: ...


class Serving:
    def __init__(self, host: Host) -> None:
        self._host = host
        self._snapshot: dict[str, str] | None = None

    async def read_tensor(self, name: str, first_row: int = 0, rows: int = 1) -> TensorRows:
        """Rows of a tensor that serves."""
        return await self.operate(ReadTensor(name, first_row, rows))

    async def checksums(self) -> dict[str, str]:
        """See ChecksumTarget."""
        return (await self.operate(ChecksumTarget())).by_name

    async def snapshot_weights(self) -> None:
        """Remembers the checksums of the weights that serve."""
        self._snapshot = await self.checksums()

    async def differing_weights(self) -> list[str]:
        """The tensors that are not as they were at ``snapshot_weights``."""
        if self._snapshot is None:
            raise ConflictError("there is no snapshot of the weights to compare with: take one first", code="conflict")
        before = self._snapshot
        now = await self.checksums()
        return sorted(name for name in before | now if before.get(name) != now.get(name))

    async def operate(self, operation: Operation[Answer]) -> Answer:
        """The engine's answer; its errors become those of HTTP."""
        self._host.require_ready()
        try:
            return await self._host.engine.call(operation)
        except SupersededError as error:
            raise ConflictError(str(error), code="superseded") from None
        except (ModelError, ConfigError) as error:
            raise InvalidRequestError(str(error)) from None
        except EngineDiedError as error:
            raise self._host.engine_gone(str(error)) from None
        except SlipstreamError as error:
            raise ApiError(str(error)) from None

    @property
    def _stats(self) -> EngineStats:
        return self._host.engine.stats
