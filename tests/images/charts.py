"""Values for the chart that together turn on all it can do, and what it makes of them."""

from __future__ import annotations

import json
from typing import Any

import chart_options
import render
import yaml

Document = dict[str, Any]

DEFAULTS: Document = yaml.safe_load((render.CHART / "values.yaml").read_text())
GPU = yaml.safe_load((render.HELM / "gpu.yaml").read_text())
EVERYTHING: Document = {
    "imagePullSecrets": [{"name": "pull"}],
    "replicas": 3,
    "options": {
        "model": "OWNER/NAME",
        "served-model-name": ["a", "b"],
        "prefix-caching": False,
        "max-running": 1000000,
    },
    "extraEnv": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
    "secret": {"create": {"SLIPSTREAM_API_KEY": "one two", "SLIPSTREAM_ADMIN_KEY": "three", "HF_TOKEN": "four"}},
    "data": {"enabled": True, "accessMode": "ReadWriteMany", "storageClass": "shared"},
    "models": {"existingClaim": "models"},
    "evolution": {"enabled": True},
    "gpu": {"count": 2, "runtimeClassName": "nvidia"},
    "podLabels": {"team": "chat"},
    "podAnnotations": {"note": "text"},
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
    "serviceAccount": {"annotations": {"role": "reader"}},
    "service": {"type": "LoadBalancer", "annotations": {"internal": "yes"}},
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "host": "chat.example",
        "tlsSecret": "tls",
        "annotations": {"a": "b"},
    },
    "networkPolicy": {"enabled": True},
    "monitoring": {"podMonitor": True, "rules": True, "labels": {"release": "prometheus"}},
}
MATRIX: dict[str, Document] = {
    "default": {},
    "gpu": GPU,
    "everything": EVERYTHING,
    "one volume": {"data": {"enabled": True}},
    "claims": {"data": {"enabled": True, "existingClaim": "mine"}, "serviceAccount": {"existing": "mine"}},
    "open": {"podDisruptionBudget": {"enabled": False}, "preStopSeconds": 0, "spreadOver": ""},
    "keda": {"autoscaling": {"enabled": True, "kind": "ScaledObject", "waiting": 1.5}},
    "scaled": {"autoscaling": {"enabled": True}, "podDisruptionBudget": {"maxUnavailable": "50%"}},
    "openshift": {"securityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}},
    "peers": {
        "networkPolicy": {"enabled": True, "from": [{"namespaceSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}]}
    },
}


def rendered(values: Document, name: str = "chat") -> list[Document]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # rules are long
    return [yaml.load(text, loader) for text in render.render(values, name=name, namespace="models")]


def of_kind(documents: list[Document], kind: str) -> Document:
    (document,) = (document for document in documents if document["kind"] == kind)
    return document


def pod_of(values: Document) -> Document:
    pod: Document = of_kind(rendered(values), "Deployment")["spec"]["template"]["spec"]
    return pod


def container_of(values: Document) -> Document:
    (container,) = pod_of(values)["containers"]
    assert isinstance(container, dict)
    return container


def schema_at(path: tuple[str, ...]) -> Document:
    """The schema of a value; empty where it is Kubernetes that knows what there may be."""
    schema: Document = json.loads(chart_options.SCHEMA.read_text())
    for name in path:
        schema = schema.get("properties", {}).get(name, {})
    return schema
