"""Which drafters the options name, and what can be seen to be wrong with them before anything is loaded. No torch."""

from __future__ import annotations

from pathlib import Path

from slipstream.engine.checkpoint import locate
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError, ModelError

NAMES = ("ngram", "suffix", "head", "draft")
NEEDS = {"head": "drafter", "draft": "draft_model"}
"""Options without which a drafter cannot be."""
MADE_HERE = ("warm", "cold", "random")
"""Values of --drafter that are no folder."""


def drafter_names(config: EngineConfig) -> list[str]:
    """The drafters that --speculation and --drafter name; raises ConfigError for what does not go together."""
    speculation = config.speculation
    if speculation == "off":
        return []
    if speculation == "auto":
        missing = {name for name, option in NEEDS.items() if getattr(config, option) is None}
        return [name for name in NAMES if name not in missing]
    names = [name.strip() for name in speculation.split(",")]
    for name in names:
        if name not in NAMES:
            raise ConfigError(
                f"--speculation {speculation}: there is no drafter {name!r}; there are {', '.join(NAMES)}"
            )
        if name in NEEDS and getattr(config, NEEDS[name]) is None:
            raise ConfigError(f"--speculation {speculation}: {name} needs --{NEEDS[name].replace('_', '-')}")
    return list(dict.fromkeys(names))


def check_drafters(config: EngineConfig) -> None:
    """Raises ConfigError or ModelError for names, folders and files that there are not."""
    names = drafter_names(config)
    folder = config.drafter
    if "head" in names and folder is not None and folder not in MADE_HERE and not Path(folder).expanduser().is_dir():
        raise ModelError(f"--drafter {folder}: there is no such folder")
    if "draft" in names and config.draft_model is not None:
        locate(config.draft_model)
