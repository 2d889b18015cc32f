"""Keys: whose they are and what they allow, from options and from a file that may change while the server runs.

Nothing here keeps a key: only its SHA-256 digest. Keys are long random texts (``slipstream keys new``), so a digest
tells nothing of them, and one look into a table by digest takes the same time for every wrong key.
"""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from slipstream.engine.config import read_option_file
from slipstream.engine.errors import ConfigError
from slipstream.server.access.account import NO_LIMITS, Account, UsageLimits
from slipstream.server.access.principal import Principal, RequestLimits

logger = logging.getLogger(__name__)

Role = Literal["user", "admin"]
NAME = r"[A-Za-z0-9._-]{1,64}"
NAMED_KEY = re.compile(rf"({NAME})=(.*[^=].*)")
"""NAME=KEY. Equal signs at the end alone are padding of base64, so such a key has no name."""
DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
"""What stands for a key wherever one can be written."""
NAME_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Key:
    name: str
    """Whose it is."""
    digest: bytes
    role: Role = "user"
    limits: RequestLimits | None = None
    """None: those of the server's options."""
    usage: UsageLimits = NO_LIMITS


def digest(secret: bytes) -> bytes:
    return sha256(secret).digest()


def written(text: str) -> bytes:
    """The digest of a key as people write it: the key itself, or its digest."""
    found = DIGEST.fullmatch(text.strip())
    return bytes.fromhex(found[1]) if found else digest(text.strip(" \t").encode())


class Keys:
    """The keys of an option, each written as KEY or NAME=KEY; several keys may have the same name."""

    def __init__(self, texts: Iterable[str], option: str, role: Role = "user") -> None:
        """Raises ConfigError for a key without content, and for one with two names."""
        self.keys: list[Key] = []
        for text in texts:
            if not text.strip():
                raise ConfigError(f"{option} must not be empty")
            named = NAMED_KEY.fullmatch(text)
            found = written(named[2] if named else text)
            # A digest keeps the name the same wherever and in whatever order keys are given, and is no secret.
            self.keys.append(Key(named[1] if named else f"key-{found.hex()[:NAME_DIGITS]}", found, role))
        require_one_name(self.keys, option)

    @property
    def digests(self) -> set[bytes]:
        return {key.digest for key in self.keys}


def require_one_name(keys: Iterable[Key], where: str) -> None:
    """Raises ConfigError for a key that two names have."""
    names: dict[bytes, str] = {}
    for key in keys:
        if names.setdefault(key.digest, key.name) != key.name:
            raise ConfigError(f"{where}: a key has two names")


def read_file(path: Path, limits: RequestLimits) -> list[Key]:
    """The keys of a file; docs/deployment.md says how it is written. ``limits`` are those of the server.

    Raises ConfigError, which repeats nothing of the file but names.
    """
    try:
        text = read_option_file(path)
    except OSError as error:
        raise ConfigError(f"--keys-file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--keys-file {path}: not UTF-8") from None
    except ValueError as error:
        raise ConfigError(f"--keys-file {path}: {error}") from None
    return parse(text, path, limits)


def parse(text: str, path: Path, limits: RequestLimits) -> list[Key]:
    """The keys in a text that ``path`` has or is to have; raises as ``read_file``."""
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # the library's own, and what Python says of huge numbers
        where = re.search(r"\(at .*\)", str(error))
        raise ConfigError(f"--keys-file {path}: not TOML {where[0] if where else ''}".rstrip()) from None
    if content.keys() - {"key", "defaults"}:
        raise ConfigError(f"--keys-file {path}: there may be [defaults], and [[key]] for each key, and nothing else")
    defaults, entries = content.get("defaults", {}), content.get("key", [])
    if not isinstance(defaults, dict) or not isinstance(entries, list):
        raise ConfigError(f"--keys-file {path}: write [defaults] once, and [[key]] for each key")
    keys = [_entry(path, number, defaults, entry, limits) for number, entry in enumerate(entries, 1)]
    first: dict[tuple[str, Role], Key] = {}
    for key in keys:
        known = first.setdefault((key.name, key.role), key)
        if (known.limits, known.usage) != (key.limits, key.usage):
            raise ConfigError(f"--keys-file {path}: keys of {key.name!r} have different limits")
    return keys


NO_REQUEST_LIMITS = RequestLimits()
LIMITS = tuple(found.name for kind in (RequestLimits, UsageLimits) for found in fields(kind))
LEAST = {"max_n": 1, "max_logprobs": -1, "most_urgent_priority": -1000, "weight": 0.001}
MOST = {"most_urgent_priority": 1000, "weight": 1000.0}


def _entry(path: Path, number: int, defaults: dict[str, Any], entry: Any, limits: RequestLimits) -> Key:
    where = f"--keys-file {path}: key {number}"
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: write it as [[key]] with name and hash")
    name, hashed, role = entry.get("name"), entry.get("hash"), entry.get("role", "user")
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise ConfigError(f"{where}: name: at most 64 letters, digits and ._-")
    where = f"{where} ({name})"
    if not isinstance(hashed, str) or not DIGEST.fullmatch(hashed):
        raise ConfigError(f"{where}: hash: sha256: and 64 hexadecimal digits, as 'slipstream keys new' prints it")
    if role not in ("user", "admin"):
        raise ConfigError(f"{where}: role: user or admin")
    found = defaults | {key: value for key, value in entry.items() if key not in ("name", "hash", "role")}
    for key, value in found.items():
        if key not in LIMITS:
            raise ConfigError(f"{where}: {key!r} is none of name, hash, role, {', '.join(LIMITS)}")
        kinds: Any = (int, float) if key == "weight" else int
        least, most = LEAST.get(key, 0), MOST.get(key, 2**53)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            raise ConfigError(f"{where}: {key}: a number from {least} to {most}")  # what stands there may be a key
    of_requests = {key: value for key, value in found.items() if hasattr(limits, key)}
    of_usage = {key: value for key, value in found.items() if key not in of_requests}
    return Key(name, written(hashed), role, replace(limits, **of_requests), UsageLimits(**of_usage))


class KeyRing:
    """All keys of a server, and the accounts of their holders."""

    def __init__(
        self, users: Keys, admins: Keys, path: str | None = None, limits: RequestLimits = NO_REQUEST_LIMITS
    ) -> None:
        """``limits`` are those of the server. Raises ConfigError for a file that cannot be used."""
        self.anonymous = Principal(limits=limits)
        """Whoever comes where nobody needs a key."""
        self._of_options = [*users.keys, *admins.keys]
        self._path = Path(path) if path is not None else None
        # With a file, names of tenants must not change when the second key is added.
        self._alone = self._path is None and len({key.name for key in users.keys}) < 2
        self._accounts: dict[tuple[str, Role], Account] = {}
        self._keys: dict[bytes, Key] = {}
        self._seen: tuple[int, ...] = ()
        self._told = ""
        """What keeps the file from being used."""
        self._use(self._read())

    @property
    def asks(self) -> bool:
        """Whether users need a key; with a file they do, even while it has none."""
        return self._path is not None or any(key.role == "user" for key in self._keys.values())

    @property
    def has_admins(self) -> bool:
        return any(key.role == "admin" for key in self._keys.values())

    @property
    def watches(self) -> bool:
        """Whether there is a file that may change."""
        return self._path is not None

    def holder(self, secret: bytes) -> Principal | None:
        """Who has this key."""
        key = self._keys.get(digest(secret))
        if key is None:
            return None
        return self._principal("" if self._alone and key.role == "user" else key.name, key)

    def named(self, name: str) -> Principal | None:
        """The user of this name, as principals have it, if there is such a key still."""
        if not name:
            return self.anonymous if self._alone else None
        found = next((key for key in self._keys.values() if (key.name, key.role) == (name, "user")), None)
        return None if found is None or self._alone else self._principal(name, found)

    def _principal(self, name: str, key: Key) -> Principal:
        return Principal(name, key.role, key.limits or self.anonymous.limits, self._accounts[key.name, key.role])

    def refresh(self, anyway: bool = False) -> bool:
        """Reads the file if it has changed, or ``anyway``; whether it did. One that cannot be used changes nothing, is
        logged, and read again the next time: what kept it from being read may have gone without a change of the file.
        """
        if self._path is None or (self._stamp() == self._seen and not anyway):
            return False
        try:
            self._use(self._read())
        except ConfigError as error:
            if str(error) != self._told or anyway:
                logger.error("%s; the keys from before go on to count", error)
            self._told, self._seen = str(error), ()
            return False
        self._told = ""
        logger.info("read --keys-file again: it has %d keys", len(self._keys) - len(self._of_options))
        return True

    def _stamp(self) -> tuple[int, ...]:
        assert self._path is not None
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> list[Key]:
        if self._path is None:
            return self._of_options
        self._seen = self._stamp()
        keys = [*self._of_options, *read_file(self._path, self.anonymous.limits)]
        holders: dict[bytes, tuple[str, Role]] = {}
        for key in keys:
            if holders.setdefault(key.digest, (key.name, key.role)) != (key.name, key.role):
                raise ConfigError(f"--keys-file {self._path}: a key of {key.name!r} is somebody else's, too")
        return keys

    def _use(self, keys: list[Key]) -> None:
        for key in keys:
            account = self._accounts.setdefault((key.name, key.role), Account(key.usage))
            if account.limits != key.usage:
                account.change(key.usage)
        self._keys = {key.digest: key for key in keys}
