"""Renders the chart without a cluster and without the helm binary.

Run, it writes what is made of other things: the options in values.schema.json, which are those of `slipstream serve`,
and the manifests in docker/kubernetes/. It needs the extra `images` (helm-python-sdk, PyYAML).
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

import helm_python
import yaml

from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.config import EngineConfig
from slipstream.server.config import ServerConfig
from slipstream.server.evolution.config import EvolutionConfig

HELM = Path(__file__).parent
CHART = HELM / "slipstream"
SCHEMA = CHART / "values.schema.json"
MANIFESTS = HELM.parent / "kubernetes"
VALUES: dict[str, Path | None] = {"slipstream.yaml": None, "slipstream-gpu.yaml": HELM / "gpu.yaml"}
"""Manifests by the file with their values; None for those of the chart."""

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

KIND_ORDER = ("ServiceAccount", "Secret", "PersistentVolumeClaim", "Service", "Deployment")
TYPES: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}


def render(values: dict[str, Any] | None = None, name: str = "slipstream", namespace: str = "default") -> list[str]:
    """Manifests as text, in the order in which they are to be applied. Raises helm_python.HelmError."""
    with helm_python.Chart.load(CHART) as chart:
        rendered = chart.render(values, name=name, namespace=namespace)
    texts = [text.strip() for path, text in rendered.items() if path.endswith(".yaml") and text.strip()]
    return sorted(texts, key=place)


def place(text: str) -> tuple[int, str]:
    kind = re.findall(r"^kind: (\w+)$", text, re.MULTILINE)[0]
    return KIND_ORDER.index(kind) if kind in KIND_ORDER else len(KIND_ORDER), kind


def manifests(values: Path | None) -> str:
    source = f", with the values of docker/helm/{values.name}" if values else ""
    head = f"# Made by docker/helm/render.py from docker/helm/slipstream{source}; change it there.\n"
    texts = render(yaml.safe_load(values.read_text()) if values else None)
    return head + "".join(f"---\n{text}\n" for text in texts)


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


def main() -> None:
    SCHEMA.write_text(schema())
    MANIFESTS.mkdir(exist_ok=True)
    for file, values in VALUES.items():
        (MANIFESTS / file).write_text(manifests(values))


if __name__ == "__main__":
    sys.exit(main())
