"""What one controller and the followers in each server tell each other: data, without torch, fit for a wire."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from slipstream.drafter.routes import CANARY_ROUTE, SHARED_ROUTE


class Trial(msgspec.Struct, frozen=True):
    """A new version and the one it replaces, both on real requests.

    A canary runs beside the live version, on the canary's route. A version that somebody made live without a trial is
    on the shared route already: then its predecessor takes the canary's route.
    """

    new: int
    old: int
    is_live: bool
    share: float
    """Share of the requests that run on the new one, between 0 and 1."""

    @property
    def beside(self) -> int:
        """The version on the canary's route."""
        return self.old if self.is_live else self.new

    def takes(self, request_id: int | str) -> bool:
        """Whether this request runs on the new version; the same answer whenever and wherever it is asked."""
        digest = blake2b(f"{self.new}/{request_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.share * 2**64

    def route(self, request_id: int | str) -> str:
        return SHARED_ROUTE if self.takes(request_id) == self.is_live else CANARY_ROUTE

    def version(self, route: str) -> int | None:
        """The version that a request on this route counts for."""
        return {SHARED_ROUTE: self.new if self.is_live else self.old, CANARY_ROUTE: self.beside}.get(route)


class Wish(msgspec.Struct, frozen=True):
    """What should draft, as of one look at the registry."""

    epoch: int
    """Epoch of the controller that says so. Followers heed no lower one than they have heard of."""
    routes: dict[str, int]
    """The live version by route; during a trial also the one on the canary's."""
    trial: Trial | None = None


class Outcome(msgspec.Struct, frozen=True):
    """A request of a trial has ended."""

    version: int
    proposals: int
    right: int
    """Proposals whose first draft token was right."""


class Refusal(msgspec.Struct, frozen=True):
    """The engine would not load a version."""

    version: int
    route: str
    reason: str
    is_misfit: bool
    """Whether the version is sound, but made for another model or of other sizes."""
