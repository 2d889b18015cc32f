"""Who sends a request, as far as its key tells, and what its tenants are called."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from slipstream.engine.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import Scope

NAMED_KEY = re.compile(r"([A-Za-z0-9._-]{1,64})=(.*[^=].*)")
"""NAME=KEY. Equal signs at the end alone are padding of base64, so such a key has no name."""
DIGEST_BYTES = 6
SCOPE_ENTRY = "slipstream.principal"


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The most that one request may ask for, by the options of these names."""

    max_n: int = 1
    max_logprobs: int = 0
    """-1: no limit."""
    most_urgent_priority: int = 0


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever holds a key: the gate puts it into the scope, and what a request may do is asked of it alone."""

    key: str = ""
    """The name of the key; empty where nobody has to be told apart: without keys, or with one."""
    role: Literal["user", "admin"] = "user"
    """Which door the key opens."""
    limits: RequestLimits = RequestLimits()

    def tenant(self, user: str) -> str:
        """The name of a tenant: nobody can name one of another key, because names of keys have no slash."""
        if not self.key:
            return user
        return f"{self.key}/{user}" if user else self.key


@dataclass(frozen=True, slots=True)
class Key:
    name: str
    secret: bytes


class Keys:
    """The keys of an option, each written as KEY or NAME=KEY; several keys may have the same name."""

    def __init__(self, written: Iterable[str], option: str) -> None:
        """Raises ConfigError for a key without content, and for one with two names."""
        self.keys: list[Key] = []
        for text in written:
            if not text.strip():
                raise ConfigError(f"{option} must not be empty")
            named = NAMED_KEY.fullmatch(text)
            secret = (named[2] if named else text).strip(" \t").encode()
            # A digest keeps the name the same wherever and in whatever order keys are given, and is no secret.
            name = named[1] if named else f"key-{blake2b(secret, digest_size=DIGEST_BYTES).hexdigest()}"
            self.keys.append(Key(name, secret))
        if len({key.secret for key in self.keys}) < len(set(self.keys)):
            raise ConfigError(f"{option}: a key has two names")
        self._alone = len({key.name for key in self.keys}) < 2

    def __bool__(self) -> bool:
        return bool(self.keys)

    @property
    def secrets(self) -> set[bytes]:
        return {key.secret for key in self.keys}

    def holder(self, sent: str | None) -> Principal | None:
        """Who sends this Authorization header; None if it holds none of the keys."""
        scheme, _, secret = (sent or "").partition(" ")
        given = secret.strip(" \t").encode("latin-1")
        # Every key is compared in full, so the time taken tells nothing about them.
        matches = [key for key in self.keys if hmac.compare_digest(given, key.secret)]
        if scheme.lower() != "bearer" or not matches:
            return None
        return Principal("" if self._alone else matches[0].name)


def principal_of(scope: Scope) -> Principal:
    """Whom the gate let in."""
    found: Principal = scope[SCOPE_ENTRY]
    return found
