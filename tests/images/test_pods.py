"""The pods of the Helm chart: they fit the server that runs in them, and clusters that trust nobody."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import chart_options
import helm_python
import httpx2
import pytest
import render
import typer.main
import yaml
from charts import DEFAULTS, EVERYTHING, GPU, MATRIX, Document, container_of, of_kind, pod_of, rendered, schema_at
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.config import EngineConfig
from slipstream.server.app import build_app
from slipstream.server.commands.cli import app as command_line
from slipstream.server.config import ServerConfig
from slipstream.server.launch import start_process
from slipstream.server.service import Service
from slipstream.server.telemetry.metrics import PREFIX

pytestmark = pytest.mark.images

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Document] = schema_at(("options",))["properties"]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
DRAWN = {
    "string": TEXT.filter(str.strip),  # an empty one is refused
    "integer": st.integers(-(2**53), 2**53),
    "number": st.floats(0, 1e12),
    "boolean": st.booleans(),
    "array": st.lists(TEXT, min_size=1, max_size=3),
}


def drawn(option: Document) -> st.SearchStrategy[Any]:
    return st.sampled_from(option["enum"]) if "enum" in option else DRAWN[option["type"]]


@settings(max_examples=30)
@given(st.fixed_dictionaries({}, optional={name: drawn(option) for name, option in OPTIONS.items()}))
def test_options_reach_the_server_as_they_were_given(options: Document) -> None:
    arguments = container_of({"options": options})["args"]
    assert all("$" not in argument.replace("$$", "") for argument in arguments), "a variable, for Kubernetes"
    command, *arguments = [argument.replace("$$", "$") for argument in arguments]
    serve: Any = typer.main.get_command(command_line).commands[command]  # type: ignore[attr-defined]
    understood = serve.make_context("serve", arguments).params
    for name, value in {**DEFAULTS["options"], **options}.items():
        assert understood[name.replace("-", "_")] == value


def test_a_server_with_gpus_does_not_fall_back_to_the_processor() -> None:
    assert not [argument for argument in container_of({})["args"] if argument.startswith("--device")]
    container = container_of({"gpu": {"count": 2}, "resources": {"limits": {"cpu": "1"}}})
    assert "--device=cuda" in container["args"]
    assert (
        container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"] == 2
    )
    chosen = container_of({"gpu": {"count": 1}, "options": {"device": "auto"}})["args"]
    assert [argument for argument in chosen if argument.startswith("--device")] == ["--device=auto"]


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_variables_are_options_of_the_server(values: Document) -> None:
    options = {
        f"SLIPSTREAM_{field.name.upper()}" for config in chart_options.CONFIGS for field in dataclasses.fields(config)
    }
    secret = {"SLIPSTREAM_API_KEY", "SLIPSTREAM_ADMIN_KEY", "HF_TOKEN"}
    assert secret <= options | {"HF_TOKEN"}
    for entry in container_of(values)["env"]:
        if entry["name"] in secret:
            assert entry["valueFrom"]["secretKeyRef"]["key"] == entry["name"]
        else:
            assert entry["name"] in options or entry in values["extraEnv"]
    # Kubernetes would set SLIPSTREAM_PORT=tcp://… for a Service called slipstream.
    assert pod_of(values)["enableServiceLinks"] is False


def test_a_secret_is_where_its_pods_look_for_it() -> None:
    documents = rendered(EVERYTHING)
    secret = of_kind(documents, "Secret")
    assert secret["stringData"] == EVERYTHING["secret"]["create"]
    references = [
        entry["valueFrom"]["secretKeyRef"] for entry in container_of(EVERYTHING)["env"] if "valueFrom" in entry
    ]
    assert references == [{"name": secret["metadata"]["name"], "key": key} for key in sorted(secret["stringData"])]
    assert all(kind["kind"] != "Secret" for kind in rendered(GPU)), "that of somebody else is not made"


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_pods_are_as_pod_security_restricted_wants_them(values: Document) -> None:
    pod = pod_of(values)
    (container,) = pod["containers"]
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers"} & set(pod)
    kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"].get("runAsUser") != 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all("hostPort" not in port for port in container["ports"])
    # What the server writes is on a volume, because its root is read-only.
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/data", "/tmp", "/home/slipstream", "/dev/shm"}
    assert pod["automountServiceAccountToken"] is False


@given(
    pause=st.integers(0, 3600),
    drain=st.floats(0, 1e5),
    stall=st.floats(0.1, 1e4),
    hang=st.floats(0, 1e4),
    start=st.integers(1, 10**5),
)
@settings(max_examples=20)
def test_nothing_is_killed_before_its_time(pause: int, drain: float, stall: float, hang: float, start: int) -> None:
    pod = pod_of(
        {
            "preStopSeconds": pause,
            "health": {"startSeconds": start},
            "options": {"drain-timeout-s": drain, "health-stall-s": stall, "engine-hang-s": hang},
        }
    )
    (container,) = pod["containers"]
    patience = {
        name: container[name]["periodSeconds"] * container[name]["failureThreshold"]
        for name in ("startupProbe", "livenessProbe")
    }
    assert pod["terminationGracePeriodSeconds"] > pause + drain
    assert ("lifecycle" in container) == (pause > 0)
    assert patience["startupProbe"] >= start
    # /health is 503 from the stall on; the engine is replaced when it hangs, and has the time of a start to load.
    assert patience["livenessProbe"] >= start + max(hang - stall, 0)


@pytest.mark.parametrize(
    ("data", "strategy"),
    [
        ({"enabled": False}, "RollingUpdate"),
        ({"enabled": True, "accessMode": "ReadWriteMany"}, "RollingUpdate"),
        ({"enabled": True, "accessMode": "ReadWriteOnce"}, "Recreate"),
    ],
)
def test_an_update_never_waits_for_a_volume_that_the_old_pod_holds(data: Document, strategy: str) -> None:
    deployment = of_kind(rendered({"data": data}), "Deployment")
    assert deployment["spec"]["strategy"]["type"] == strategy
    assert ("rollingUpdate" in deployment["spec"]["strategy"]) == (strategy == "RollingUpdate")


async def test_probes_and_prometheus_need_neither_key_nor_name() -> None:
    container = container_of(EVERYTHING)
    monitor = of_kind(rendered(EVERYTHING), "PodMonitor")["spec"]["podMetricsEndpoints"][0]
    (environment,) = (entry["value"] for entry in container["env"] if entry["name"] == "SLIPSTREAM_HOST")
    config = ServerConfig(host=environment, api_key=("one",), allowed_host=("chat.example",))
    app = build_app(Service(config, EngineConfig(), TrafficConfig(), start_process))
    statuses = {}
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://10.1.2.3:8000") as client:
        probes = {container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
        for path in (*probes, monitor["path"], "/v1/models"):
            statuses[path] = (await client.get(path)).status_code
    # Still loading: not ready, and a start-up probe goes on waiting.
    assert statuses == {"/ready": 503, "/health": 503, "/metrics": 200, "/v1/models": 401}


def test_scaling_asks_for_a_metric_that_there_is() -> None:
    metric = f"{PREFIX}num_requests_waiting"
    assert "`num_requests_waiting`" in (ROOT / "docs" / "metrics.md").read_text()
    assert metric in of_kind(rendered(MATRIX["keda"]), "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]
    with helm_python.Chart.load(render.CHART) as chart:
        notes = chart.render(MATRIX["scaled"], name="chat")["slipstream/templates/NOTES.txt"]
    rule = yaml.safe_load(notes[notes.index("  - seriesQuery") :])[0]
    wanted = of_kind(rendered(MATRIX["scaled"]), "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"][
        "name"
    ]
    assert rule["seriesQuery"].startswith(metric + "{") and rule["name"]["as"] == wanted
    assert "replicas" not in of_kind(rendered(MATRIX["scaled"]), "Deployment")["spec"], "the autoscaler's alone"
