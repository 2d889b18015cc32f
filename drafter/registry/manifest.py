"""What is known of a drafter version: the manifest that lies beside its weights. Imports no torch."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from slipstream.engine.errors import MisfitError, ModelError, UnreadableError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"

Origin = Literal["cold", "trained", "imported", "shipped"]


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """What a version saw since its parent."""

    samples: int = 0
    """Stored requests."""
    tokens: int = 0
    steps: int = 0
    """Steps of the optimizer."""
    began: datetime | None = None
    """Time of the oldest sample; None if nothing was learned."""
    ended: datetime | None = None
    """Time of the newest one."""
    target_version: int = 0
    """Version of the target's weights that served; 0 for those of its files."""
    shares_output: bool = False
    """Whether its output rows are the target's own, as they were in that version. Without it they may be so, too."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Written once with the weights, never changed."""

    format_version: int = FORMAT_VERSION
    version: int
    """Higher than that of every version made before in the same registry."""
    head: dict[str, Any]
    """Architecture and sizes: config.json of the published EAGLE-3 layout."""
    parent: int | None = None
    """The version training started from."""
    target: str
    """Fingerprint of the model it drafts for."""
    target_name: str = ""
    """A name of the model for people."""
    origin: Origin
    route: str = ""
    """Tenant or domain it was made for; empty for the one all share."""
    note: str = ""
    training: Training = Training()
    gate: dict[str, float] = {}
    """What it scored on held-out traffic before it was published."""
    weights_bytes: int
    weights_sha256: str
    created_at: datetime


def encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode(data: bytes, source: Path | str) -> Manifest:
    """Raises ModelError naming ``source`` if it is damaged, MisfitError if it is of a newer format."""
    try:
        # The format comes first: what else a newer manifest holds may not even parse.
        written = msgspec.json.decode(data, type=_Format).format_version
        if written > FORMAT_VERSION:
            raise MisfitError(
                f"{source} has format {written}, this version of Slipstream reads formats up to {FORMAT_VERSION}; "
                "use the Slipstream that wrote it, or a newer one"
            )
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{source} is no drafter manifest: {error}") from None


def unknown(version: int, route: str) -> Manifest:
    """Stands for one that cannot be read."""
    nothing: dict[str, Any] = {"head": {}, "target": "", "weights_bytes": 0, "weights_sha256": ""}
    return Manifest(
        version=version, route=route, origin="imported", created_at=datetime.fromtimestamp(0, UTC), **nothing
    )


def read(folder: Path) -> Manifest:
    """The manifest in a version folder; raises ModelError."""
    path = folder / MANIFEST_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(error, f"{folder} is no drafter version: cannot read {path}") from None
    return decode(data, path)


def unreadable(error: OSError, what: str) -> ModelError:
    """What to raise of a version's file: damage if it is gone; what else keeps it from being read may pass."""
    is_gone = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return (ModelError if is_gone else UnreadableError)(f"{what}: {error.strerror}")


class _Format(msgspec.Struct):
    format_version: int
