"""Renders the chart without a cluster and without the helm binary.

Run, it writes what is made of other things: values.schema.json (`chart_options.py`) and the manifests
in docker/kubernetes/. It needs the extra `images` (helm-python-sdk, PyYAML).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import chart_options
import helm_python
import yaml

HELM = Path(__file__).parent
CHART = HELM / "slipstream"
MANIFESTS = HELM.parent / "kubernetes"
VALUES: dict[str, Path | None] = {"slipstream.yaml": None, "slipstream-gpu.yaml": HELM / "gpu.yaml"}
"""Manifests by the file with their values; None for those of the chart."""

KIND_ORDER = ("ServiceAccount", "Secret", "PersistentVolumeClaim", "Service", "Deployment")


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


def main() -> None:
    chart_options.SCHEMA.write_text(chart_options.schema())
    MANIFESTS.mkdir(exist_ok=True)
    for file, values in VALUES.items():
        (MANIFESTS / file).write_text(manifests(values))


if __name__ == "__main__":
    sys.exit(main())
