"""An update of the target's weights that is under way: what has come of it, from whom, and what is on its way."""

from __future__ import annotations

import time
from concurrent.futures import Future

from slipstream.engine.errors import ModelError, SupersededError
from slipstream.engine.models.weights import Digests, Weights
from slipstream.engine.operations import UpdateMode
from slipstream.engine.target.groups import Transfer
from slipstream.engine.target.lora import Lora
from slipstream.engine.target.senders import Senders


class Update:
    def __init__(
        self, version: int, mode: UpdateMode, name: str, weights: Weights, digests: Digests | None = None
    ) -> None:
        self.version, self.mode, self.name = version, mode, name or str(version)
        self.began = self.touched = time.perf_counter()
        self.lora = Lora()
        self.digests = digests
        """What the numbers that have come add up to, where weights keep others of them."""
        self.senders: Senders = frozenset()
        """Who has sent the tensors that have come."""
        self.failure = ""
        """Why it cannot be finished any more."""
        self._is_over = False
        """Whether that is no fault of what was sent."""
        self._weights: Weights | None = weights
        self._came_from: dict[str, Senders] = {}

    @property
    def weights(self) -> Weights:
        """Raises ModelError where it has failed, SupersededError where it is over."""
        if self._weights is None:
            error = SupersededError if self._is_over else ModelError
            raise error(f"the update to version {self.name} cannot be finished: {self.failure}")
        return self._weights

    def check(self) -> None:
        """Raises what ``weights`` does."""
        assert self.weights is not None

    def came_from(self, name: str, senders: Senders) -> None:
        """Notes who sends a tensor. Raises ModelError where others have sent it before: two trainers make a mix."""
        self.senders |= senders
        if self._came_from.setdefault(name, senders).isdisjoint(senders):
            raise ModelError(
                f"tensor {name!r} has come from another process or group before: two trainers send at once, or one was "
                "started again; begin an update, and send all of it"
            )

    def end(self, why: str) -> None:
        """It is given up, or serves; what still comes of it has nowhere to go."""
        self._is_over = self._is_over or not self.failure
        self.fail(why)

    def fail(self, why: str) -> None:
        """The first reason counts. What has come is not kept."""
        self.failure, self._weights = self.failure or why, None
        self.lora = Lora()


class Arrival:
    """Tensors on their way from a trainer's group into an update."""

    def __init__(self, update: Update, senders: Senders, transfer: Transfer) -> None:
        self.update, self.senders, self.transfer = update, senders, transfer
        self.done: Future[int] = Future()
        self.laid_out: Future[int] | None = None
        """The last of them that came."""
