"""The compose files: up until healthy, scraped by Prometheus, and every query answered."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monitoring
import pytest
import yaml
from containers import Container
from engine_here import Docker, unpack, until

pytestmark = pytest.mark.images
PROMETHEUS = ("prometheus",)
"""Debian's package, for promtool, and for the server where no images can be pulled."""
QUESTION = "Name a river."


@dataclass
class Stack:
    docker: Docker
    files: tuple[Path, ...]
    environment: dict[str, str]

    def __call__(self, *arguments: str, timeout: float = 600) -> str:
        files = [part for file in self.files for part in ("-f", str(file))]
        return self.docker("compose", *files, *arguments, environment=self.environment, timeout=timeout)

    def container(self, service: str) -> Container:
        return Container(self.docker, self("ps", "-q", "-a", service))

    def port(self, service: str, port: int) -> str:
        return f"http://{self('port', service, str(port)).splitlines()[0]}"


@pytest.fixture(scope="module")
def promtool(work: Path, docker: Docker) -> Path:
    return unpack(work, PROMETHEUS, "usr/bin/promtool") / "usr" / "bin" / "promtool"


@pytest.fixture(scope="module")
def prometheus_image(docker: Docker, tree: Path, promtool: Path, work: Path) -> None:
    """What stands in for Prometheus' image where it cannot be pulled."""
    if not docker.is_stand_in:
        return
    name = yaml.safe_load((tree / "docker" / "compose.yaml").read_text())["services"]["prometheus"]["image"]
    folder = work / "prometheus"
    folder.mkdir(exist_ok=True)
    for program in ("prometheus", "promtool"):
        copy = folder / program
        if not copy.exists():
            copy.hardlink_to(promtool.with_name(program))
    lines = ["FROM standin:base", "COPY prometheus promtool /bin/"]
    lines += ["RUN mkdir -p /prometheus /etc/prometheus && chown 65534:65534 /prometheus"]
    lines += ["USER 65534:65534", "WORKDIR /prometheus", 'VOLUME ["/prometheus"]', 'ENTRYPOINT ["/bin/prometheus"]']
    (folder / "Dockerfile").write_text("\n".join(lines) + "\n")
    docker("build", "-t", name, str(folder))


@pytest.fixture(scope="module")
def stack(
    docker: Docker, images: Any, tree: Path, prometheus_image: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """The stack with evolution by a trainer of its own, on free ports, with short rounds."""
    hurried = tmp_path_factory.mktemp("stack") / "hurried.yaml"
    server = {"SLIPSTREAM_ADMIN_KEY": "admin-of-the-proof", "SLIPSTREAM_CANARY_REQUESTS": "20"}
    services = {"slipstream": {"environment": server, "healthcheck": {"interval": "1s"}}}
    hurried.write_text(yaml.safe_dump({"services": services | {"prometheus": {"healthcheck": {"interval": "1s"}}}}))
    folder = tree / "docker"
    ports = {f"PUBLISH{name}": "127.0.0.1:0" for name in ("", "_PROMETHEUS", "_GRAFANA")}
    environment = ports | {"SLIPSTREAM_IMAGE": images.cpu, "COMPOSE_PROJECT_NAME": "slipstream-proof", "MEMORY": "2g"}
    made = Stack(docker, (folder / "compose.yaml", folder / "compose.evolve.yaml", hurried), environment)
    try:
        made("up", "-d", "--no-build", "--pull", "never", "--wait", "--wait-timeout", "300", "slipstream", "prometheus")
        yield made
    finally:
        made("down", "-v", "--timeout", "45")


@pytest.fixture(scope="module")
def server(stack: Stack) -> Container:
    return stack.container("slipstream")


@pytest.mark.parametrize("over", [(), ("compose.gpu.yaml",), ("compose.evolve.yaml",), ("compose.gpu.yaml", "compose.evolve.yaml")])
def test_compose_takes_the_files(docker: Docker, tree: Path, over: tuple[str, ...]) -> None:
    files = ("compose.yaml", *over)
    stack = Stack(docker, tuple(tree / "docker" / file for file in files), {})
    found = yaml.safe_load(stack("config"))
    for name, service in found["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", ())), name
    served = found["services"]["slipstream"]
    assert served["stop_grace_period"] == "45s"
    if "compose.gpu.yaml" in over:
        [device] = served["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
        assert served["build"]["dockerfile"] == "docker/Dockerfile" and served["image"] == "slipstream:cuda"


def test_the_stack_comes_up_hardened(server: Container) -> None:
    found = server.docker.inspect(server.name)
    assert found["State"]["Health"]["Status"] == "healthy"
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and found["Config"]["User"] == "10001:0"
    assert host["Memory"] == 2 << 30
    assert server.stream(QUESTION, 16).join().is_whole


def test_rules_and_their_tests(tree: Path, promtool: Path) -> None:
    folder = tree / "docker" / "prometheus"
    for arguments in (("check", "config", "--syntax-only", "prometheus.yml"), ("check", "rules", "rules.yml")):
        done = subprocess.run([promtool, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([promtool, "test", "rules", "rules_test.yml"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
