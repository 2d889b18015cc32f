"""Who sends a request, as far as its key tells, and what its tenants are called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from slipstream.server.access.account import Account

if TYPE_CHECKING:
    from starlette.types import Scope

SCOPE_ENTRY = "slipstream.principal"


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The most that one request may ask for, by the options of these names."""

    max_n: int = 1
    max_logprobs: int = 0
    """-1: no limit."""
    most_urgent_priority: int = 0
    """Above 0, it is the priority of requests that name none, too."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever holds a key: the gate puts it into the scope, and what a request may do is asked of it alone."""

    key: str = ""
    """The name of the key; empty where nobody has to be told apart: without keys, or with one."""
    role: Literal["user", "admin"] = "user"
    """Which door the key opens."""
    limits: RequestLimits = RequestLimits()
    account: Account = field(default_factory=Account, compare=False)
    """What its requests take together."""

    def tenant(self, user: str) -> str:
        """The name of a tenant: nobody can name one of another key, because names of keys have no slash."""
        if not self.key:
            return user
        return f"{self.key}/{user}" if user else self.key


def principal_of(scope: Scope) -> Principal:
    """Whom the gate let in."""
    found: Principal = scope[SCOPE_ENTRY]
    return found


def owner_of(scope: Scope) -> str:
    """Whose is what is kept: all of the holders of a key see it, since whoever fetches something names no user."""
    return principal_of(scope).tenant("")
