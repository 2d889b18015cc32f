"""The options of `slipstream serve` in the chart's values.schema.json.

`render.py` writes them. What is here needs no extra, so that `make test` finds a schema that was left behind.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.config import EngineConfig
from slipstream.server.config import ServerConfig
from slipstream.server.evolution.config import EvolutionConfig

SCHEMA = Path(__file__).parent / "slipstream" / "values.schema.json"

CONFIGS = (ServerConfig, EngineConfig, TrafficConfig, EvolutionConfig)
SET_BY_CHART = {
    "host": "listen",
    "port": "service.port",
    "api_key": "secret",
    "admin_key": "secret",
    "registry": "evolution",
    "evolve": "evolution",
    "traffic_log": "evolution",
    "traffic_folder": "evolution",
}
"""Options that are no values, and which values take their place."""
NEEDED = ("drain-timeout-s", "engine-hang-s", "health-stall-s")
"""Options that the chart computes with."""

TYPES: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}


def schema() -> str:
    """values.schema.json with the options of today."""
    whole = json.loads(SCHEMA.read_text())
    fields = [
        (field, typing.get_type_hints(config)[field.name]) for config in CONFIGS for field in dataclasses.fields(config)
    ]
    whole["properties"]["options"] = {
        "type": "object",
        "additionalProperties": False,
        "required": list(NEEDED),
        "properties": {
            field.name.replace("_", "-"): schema_of(kind) for field, kind in fields if field.name not in SET_BY_CHART
        },
    }
    return json.dumps(whole, indent=2) + "\n"


def schema_of(kind: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        (kind,) = (argument for argument in arguments if argument is not types.NoneType)
        return schema_of(kind)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": {"type": TYPES[arguments[0]]}}
    return {"type": TYPES[kind]}
