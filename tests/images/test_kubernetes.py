"""The Helm chart, without a cluster: what it renders is valid, and every value counts or is refused."""

from __future__ import annotations

import copy
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import render
import yaml
from charts import DEFAULTS, EVERYTHING, MATRIX, Document, of_kind, rendered, schema_at

pytestmark = pytest.mark.images

ROOT = Path(__file__).parents[2]
VERSIONS = ("1.27", "1.32", "1.37")
"""The oldest Kubernetes that Chart.yaml allows, and later ones."""

# Custom resources are not in the schemas of Kubernetes: the fields that their operators know, as far as we use them.
SCALE_DOWN = {
    "stabilizationWindowSeconds": int,
    "policies": [{"type": str, "value": int, "periodSeconds": int}],
}
CUSTOM: dict[str, Document] = {
    "PodMonitor": {
        "jobLabel": str,
        "selector": dict,
        "podMetricsEndpoints": [{"port": str, "path": str, "interval": str}],
    },
    "PrometheusRule": {"groups": [{"name": str, "rules": list}]},
    "ScaledObject": {
        "scaleTargetRef": {"name": str},
        "minReplicaCount": int,
        "maxReplicaCount": int,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": SCALE_DOWN}}},
        "triggers": [{"type": str, "metadata": {"serverAddress": str, "query": str, "threshold": str}}],
    },
}


def validate(document: Document, version: str) -> None:
    shape = CUSTOM.get(document["kind"])
    if shape is None:
        kubernetes_validate.validate(document, version, strict=True)
    else:
        check_shape(document["spec"], shape, document["kind"])


def check_shape(value: Any, shape: Any, where: str) -> None:
    if isinstance(shape, dict):
        assert set(value) == set(shape), where
        for name, inner in shape.items():
            check_shape(value[name], inner, f"{where}.{name}")
    elif isinstance(shape, list):
        for item in value:
            check_shape(item, shape[0], where)
    else:
        assert isinstance(value, shape), where


def test_the_chart_has_no_fault_that_helm_sees() -> None:
    for values in MATRIX.values():
        report = helm_python.lint(render.CHART, values, strict=True)
        assert not report["errors"]
        assert {message["error"] for message in report["messages"]} <= {"icon is recommended"}


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_manifests_are_valid(values: Document) -> None:
    for document in rendered(values):
        for version in VERSIONS:
            validate(document, version)


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_references_lead_somewhere(values: Document) -> None:
    documents = rendered(values)
    names = {(document["kind"], document["metadata"]["name"]) for document in documents}
    assert len(names) == len(documents)
    deployment, service = of_kind(documents, "Deployment"), of_kind(documents, "Service")
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    labels, ports = template["metadata"]["labels"].items(), {port["name"] for port in container["ports"]}

    for selector in found(documents, "matchLabels"):
        assert selector.items() <= labels
    assert service["spec"]["selector"].items() <= labels
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert {probe["port"] for probe in found(container, "httpGet")} <= ports
    assert {endpoint["port"] for each in found(documents, "podMetricsEndpoints") for endpoint in each} <= ports
    for target in found(documents, "scaleTargetRef"):
        assert ("Deployment", target["name"]) in names
    for backend in found(documents, "backend"):
        assert ("Service", backend["service"]["name"]) in names
        assert backend["service"]["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}

    made = {"serviceAccountName": "ServiceAccount", "claimName": "PersistentVolumeClaim"}
    given = {"mine", "models"}
    for field, kind in made.items():
        assert all(name in given or (kind, name) in names for name in found(template, field))
    assert [mount["name"] for mount in container["volumeMounts"]] == [
        each["name"] for each in template["spec"]["volumes"]
    ]


def found(value: Any, field: str) -> list[Any]:
    """What this field has, wherever it is."""
    if isinstance(value, list):
        return [each for item in value for each in found(item, field)]
    if not isinstance(value, dict):
        return []
    return [value[name] for name in value if name == field] + [
        each for inner in value.values() for each in found(inner, field)
    ]


@pytest.mark.parametrize("release", ["a", "slipstream", "my-slipstream-2", "x" * 53])
def test_names_are_names_of_the_domain_name_system(release: str) -> None:
    for document in rendered(EVERYTHING, release):
        metadata = document["metadata"]
        assert re.fullmatch("[a-z]([a-z0-9-]{0,61}[a-z0-9])?", metadata["name"])
        assert all(
            re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", value) for value in metadata["labels"].values()
        )


def test_the_operator_gets_the_rules_that_prometheus_has() -> None:
    rules = (ROOT / "docker" / "prometheus" / "rules.yml").read_text()
    assert of_kind(rendered(EVERYTHING), "PrometheusRule")["spec"] == yaml.safe_load(rules)
    known = {"alert", "record", "expr", "for", "keep_firing_for", "labels", "annotations"}
    assert all(set(rule) <= known for group in yaml.safe_load(rules)["groups"] for rule in group["rules"])


def test_manifests_in_the_repository_are_those_of_the_chart() -> None:
    for file, values in render.VALUES.items():
        assert (render.MANIFESTS / file).read_text() == render.manifests(values), "run docker/helm/render.py"


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    deployment = of_kind(rendered({}), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container["livenessProb"] = container.pop("livenessProbe")
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessProb"):
        validate(deployment, VERSIONS[0])


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replica": 2}, "replica"),
        ({"options": {"max-runing": 3}}, "max-runing"),
        ({"options": {"max-running": "3"}}, "max-running"),
        ({"options": {"api-key": ["secret"]}}, "api-key"),
        ({"options": {"pipeline": False}}, "pipeline"),
        ({"options": {"drain-timeout-s": None}}, "drain-timeout-s"),
        ({"secret": {"create": {"SLIPSTREAM_APIKEY": "x"}}}, "SLIPSTREAM_APIKEY"),
        ({"secret": {"existing": "mine"}}, "secret.keys"),
        ({"secret": {"keys": ["HF_TOKEN"]}}, "secret.existing"),
        ({"secret": {"existing": "mine", "keys": ["HF_TOKEN"], "create": {"HF_TOKEN": "x"}}}, "one of them"),
        ({"securityContext": {"runAsUser": 0}}, "runAsUser"),
        ({"evolution": {"enabled": True}}, "data.enabled"),
        ({"replicas": 2, "data": {"enabled": True}}, "ReadWriteMany"),
        ({"autoscaling": {"enabled": True}, "data": {"enabled": True, "existingClaim": "mine"}}, "ReadWriteMany"),
        ({"autoscaling": {"enabled": True, "minReplicas": 9}}, "minReplicas"),
        ({"ingress": {"enabled": True}}, "ingress.host"),
    ],
    ids=str,
)
def test_values_that_cannot_be_meant_are_refused(values: Document, named: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(named)):
        rendered(values)


# Every value counts ---------------------------------------------------------------------------------------------------

OTHER: dict[tuple[str, ...], Any] = {
    ("listen",): "::",
    ("image", "tag"): "cuda",
    ("strategy",): "Recreate",
    ("data", "enabled"): None,  # evolution needs it; the matrix has both
    ("data", "size"): "1Gi",
    ("data", "accessMode"): None,
    ("sharedMemory",): "2Gi",
    ("secret", "existing"): None,
    ("secret", "keys"): None,
    ("secret", "create"): {"HF_TOKEN": "five"},
    ("networkPolicy", "from"): [{"podSelector": {"matchLabels": {"may": "ask"}}}],
    ("extraEnv",): [{"name": "A", "value": "b"}],
    ("monitoring", "interval"): "7s",
}


def leaves(values: Document, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def another(path: tuple[str, ...], value: Any) -> Any:
    """A value that is not this one; None where there is none that could stand alone."""
    if path in OTHER:
        return OTHER[path]
    schema = schema_at(path)
    if "enum" in schema:
        return next(choice for choice in schema["enum"] if choice not in (value, ""))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}other"
    return [{"name": "other"}] if isinstance(value, list) else {"other": "other"}


def changed(values: Document, path: tuple[str, ...], value: Any) -> Document:
    values = copy.deepcopy(values)
    inner = values
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
    inner[path[-1]] = value
    return values


@pytest.mark.parametrize("path", [path for path, _ in leaves(DEFAULTS)], ids=".".join)
def test_every_value_changes_what_is_rendered(path: tuple[str, ...]) -> None:
    base = EVERYTHING
    if path[0] == "autoscaling":
        kind = "ScaledObject" if path[1] == "prometheus" else "HorizontalPodAutoscaler"
        base = {**EVERYTHING, "autoscaling": {"enabled": True, "kind": kind}}
    with helm_python.Chart.load(render.CHART) as chart:
        now = functools.reduce(lambda values, name: values[name], path, chart.merge_values(base))
    value = another(path, now)
    if value is not None:
        assert rendered(base) != rendered(changed(base, path, value))


def test_the_chart_is_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((render.CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version
