"""Sizes as people write and read them."""

from __future__ import annotations

import math
import re

from slipstream.engine.errors import ConfigError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
SHOWN = (("GiB", 1 << 30, 100), ("MiB", 1 << 20, 10), ("KiB", 1 << 10, 10))
"""Units of sizes for people, the largest first, and what part of each is the least that is shown."""


def parse_size(text: str, option: str) -> int:
    """Bytes of "512MiB", "2GiB", "1.5 GB", "100000000"; raises ConfigError naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", text.lower())
    if not match or match[2] not in UNITS:
        raise ConfigError(f"--{option} {text!r} is not a size; write it like 512MiB or 2GiB")
    return int(float(match[1]) * UNITS[match[2]])


def human_size(size: int, least: bool = False) -> str:
    """Bytes as "1.50 GiB", "512.0 MiB", "24.0 KiB" or "12 B".

    Rounded down, so that as much is there; up where it is the ``least`` that is asked for, so that it is enough.
    """
    for unit, factor, parts in SHOWN:
        if size >= factor:
            shown = math.ceil(size / factor * parts) if least else size * parts // factor
            return f"{shown / parts:.{len(str(parts)) - 1}f} {unit}"
    return f"{size} B"
