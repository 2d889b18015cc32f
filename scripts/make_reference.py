"""Writes docs/options.md: every option of ``slipstream serve``, from the classes that have them.

A test keeps the page current (tests/server/test_docs.py).
"""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.config import EngineConfig
from slipstream.server.config import ServerConfig
from slipstream.server.evolution.config import EvolutionConfig

PAGE = Path(__file__).parents[1] / "docs/options.md"
CONFIGS = (ServerConfig, EngineConfig, TrafficConfig, EvolutionConfig)
HEAD = """# Options

Every option of `slipstream serve`; `slipstream serve --help` says the same. Each can be set in the environment:
`--max-running` as `SLIPSTREAM_MAX_RUNNING`, a list separated by spaces.
Made by scripts/make_reference.py from the code: change it there.
"""


def page() -> str:
    parts = [HEAD]
    for config in CONFIGS:
        parts.append(f"\n## {config.__name__.removesuffix('Config')}\n\n| option | default | |\n|---|---|---|\n")
        kinds = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            name = f"--{field.name.replace('_', '-')}"
            names = (
                f"`{name}`, `--no-{name[2:]}`" if kinds[field.name] is bool else f"`{name}`{values(kinds[field.name])}"
            )
            told = field.metadata["help"].replace("|", "\\|").replace("<", "&lt;")
            parts.append(f"| {names} | {default(field.default)} | {told} |\n")
    return "".join(parts)


def values(kind: Any) -> str:
    if typing.get_origin(kind) is types.UnionType:
        kind = next(each for each in typing.get_args(kind) if each is not types.NoneType)
    if typing.get_origin(kind) is typing.Literal:
        return " " + " \\| ".join(f"`{value}`" for value in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return " …"
    return ""


def default(value: Any) -> str:
    if value is None or value in ((), ""):
        return "–"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page())
