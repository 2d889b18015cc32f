"""Sizes as people write them."""

from __future__ import annotations

import re

from slipstream.engine.errors import ConfigError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def parse_size(text: str, option: str) -> int:
    """Bytes of "512MiB", "2GiB", "1.5 GB", "100000000"; raises ConfigError naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", text.lower())
    if not match or match[2] not in UNITS:
        raise ConfigError(f"--{option} {text!r} is not a size; write it like 512MiB or 2GiB")
    return int(float(match[1]) * UNITS[match[2]])
