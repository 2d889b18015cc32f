"""Which drafters a server runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slipstream.drafter.lookup import NGramDrafter, SuffixDrafter
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.speculation.protocol import Drafter

NAMES = ("ngram", "suffix")
SUFFIX_CAPACITY = 200_000
"""Tokens of earlier answers that are kept; about 100 bytes each."""


def drafter_names(speculation: str) -> list[str]:
    """Names in a value of --speculation; raises ConfigError for an unknown one."""
    if speculation == "off":
        return []
    if speculation == "auto":
        return list(NAMES)
    names = [name.strip() for name in speculation.split(",")]
    for name in names:
        if name not in NAMES:
            raise ConfigError(
                f"--speculation {speculation}: there is no drafter {name!r}; there are {', '.join(NAMES)}"
            )
    return names


def make_drafters(config: EngineConfig) -> Sequence[Drafter]:
    """The drafters of a configuration, in the order in which they are asked."""
    makers: dict[str, Callable[[], Drafter]] = {
        "ngram": NGramDrafter,
        "suffix": lambda: SuffixDrafter(SUFFIX_CAPACITY),
    }
    return [makers[name]() for name in dict.fromkeys(drafter_names(config.speculation))]
