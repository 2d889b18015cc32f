"""The compose files: up until healthy, scraped by Prometheus, and every query answered."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monitoring
import numpy as np
import pytest
import yaml
from containers import Container
from engine_here import Docker, unpack, until

from slipstream.drafter.traffic.index import held_out
from slipstream.drafter.traffic.store import question_of

pytestmark = pytest.mark.images
PROMETHEUS = ("prometheus",)
"""Debian's package, for promtool, and for the server where no images can be pulled."""
QUESTION = "Name a river."
VERBS = ("Say", "Recite", "Spell", "Write", "Sing")
NOUNS = (
    *("a king", "salt", "the moon", "a spider", "bread", "a lion", "the sea", "a queen", "the sun", "a horse"),
    *("the wind", "a cat", "the rain", "a dog", "snow", "a fox", "the king", "a bear", "milk", "a bird", "gold"),
    *("a fish", "the river", "a baker", "the night", "a farmer", "silver", "a ship", "the snow", "a teacher"),
)
MARKS = (".", "!", " now.", " again.", " please.", " today.", " once.", " too.", " slowly.", " first.")
CANDIDATES = itertools.product(VERBS, MARKS, NOUNS)
"""Questions, each another one, since the gate looks for that; with answers so alike that a head learns them in seconds.
"""
FOR_TRAINING: deque[str] = deque()
FOR_THE_GATE: deque[str] = deque()
"""Looked at already, and not asked yet."""
HURRIED = {
    "SLIPSTREAM_REGISTRY": "/data/drafters",
    "SLIPSTREAM_TRAFFIC_LOG": "features",
    "SLIPSTREAM_TRAFFIC_FOLDER": "/data/traffic",
    "SLIPSTREAM_EVOLVE": "always",
    "SLIPSTREAM_EVOLVE_FIRST_TOKENS": "150",
    "SLIPSTREAM_EVOLVE_ROUND_TOKENS": "1500",
    "SLIPSTREAM_CANARY_REQUESTS": "20",
    "SLIPSTREAM_MAX_DRAFT_TOKENS": "3",
    "SLIPSTREAM_ADMIN_KEY": "admin-of-the-proof",
}
"""Rounds and trials of seconds."""


@dataclass
class Stack:
    docker: Docker
    files: tuple[Path, ...]
    environment: dict[str, str]

    def __call__(self, *arguments: str, timeout: float = 600) -> str:
        files = [part for file in self.files for part in ("-f", str(file))]
        return self.docker("compose", *files, *arguments, environment=self.environment, timeout=timeout)

    def up(self, *services: str) -> None:
        """Returns when they are healthy; raises RuntimeError with their logs."""
        try:
            pull = "never" if self.docker.is_stand_in else "missing"
            self("up", "-d", "--no-build", "--pull", pull, "--wait", "--wait-timeout", "300", *services)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self('logs', '--no-color', *services)[-4000:]}") from None

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
    """The server with evolution, on free ports, with short rounds, and Prometheus."""
    hurried, folder = tmp_path_factory.mktemp("stack") / "hurried.yaml", tree / "docker"
    often = {"healthcheck": {"interval": "1s"}}
    hurried.write_text(
        yaml.safe_dump({"services": {"slipstream": often | {"environment": HURRIED}, "prometheus": often}})
    )
    ports = {f"PUBLISH{name}": "127.0.0.1:0" for name in ("", "_PROMETHEUS", "_GRAFANA")}
    environment = ports | {
        "SLIPSTREAM_IMAGE": images.cpu,
        "TRAINER_IMAGE": images.cpu,
        "COMPOSE_PROJECT_NAME": f"slipstream-proof-{os.getpid()}",
        "MEMORY": "2g",
    }
    made = Stack(docker, (folder / "compose.yaml", hurried), environment)
    try:
        made.up("slipstream", "prometheus")
        yield made
    finally:
        made("down", "-v", "--timeout", "45")


@pytest.fixture(scope="module")
def server(stack: Stack) -> Container:
    return stack.container("slipstream")


def next_question(server: Container, for_the_gate: bool) -> str:
    """One that training must not see, or one that it may. One in ten is held out by its number."""
    wanted = FOR_THE_GATE if for_the_gate else FOR_TRAINING
    while not wanted:
        verb, mark, noun = next(CANDIDATES)
        question = f"{verb} the alphabet to {noun}{mark}"
        prompt = server.post("/tokenize", {"messages": [{"role": "user", "content": question}]})["tokens"]
        is_held_out = held_out(question_of(np.array(prompt, np.int32)))
        (FOR_THE_GATE if is_held_out else FOR_TRAINING).append(question)
    return wanted.popleft()


def ask(server: Container, questions: int) -> None:
    """So many, eight at a time; then the processor is free for training.

    Three of eight are for the gate, which wants some different ones: as they come it would have to wait for long.
    """
    for _ in range(0, questions, 8):
        asked = [next_question(server, i % 8 in (2, 5, 7)) for i in range(8)]
        assert all(answer.join().is_whole for answer in [server.stream(each, 12, temperature=0) for each in asked])


def ask_until(server: Container, happened: Callable[[], bool]) -> None:
    """Asks, lets it train, and asks more if what there was did not do for a version; raises TimeoutError."""
    for _ in range(6):
        ask(server, 40)
        with contextlib.suppress(TimeoutError):
            until(happened, 45, 0.5)
            return
    raise TimeoutError(f"it did not happen: {server.log}")


def drafting(server: Container) -> int:
    """The version that the engine drafts with."""
    return int(server.metric("drafter_version", route=""))


def drafters(server: Container) -> str:
    """The versions in the registry, as the command line in the container lists them."""
    return server.docker("exec", server.name, "slipstream", "drafter", "list", "--json")


def newest(server: Container) -> int:
    return max((each["version"] for each in json.loads(drafters(server))), default=0)


LAID_OVER: tuple[tuple[str, ...], ...] = (
    (),
    ("compose.gpu.yaml",),
    ("compose.evolve.yaml",),
    ("compose.gpu.yaml", "compose.evolve.yaml"),
)


@pytest.mark.parametrize("over", LAID_OVER)
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


def test_compose_takes_the_variables_that_its_page_lists(docker: Docker, tree: Path) -> None:
    given = {
        "MODELS": "/srv/models",
        "MEMORY": "3g",
        "CPUS": "1.5",
        "TRAINER_MEMORY": "2g",
        "GPUS": "2",
        "SHM_SIZE": "1g",
    }
    given |= {"PUBLISH": "0.0.0.0:81", "PUBLISH_PROMETHEUS": "0.0.0.0:82", "PUBLISH_GRAFANA": "0.0.0.0:83"}
    given |= {"GRAFANA_PASSWORD": "secret", "METRICS_RETENTION": "3d", "TRAINER_IMAGE": "x:y", "REVISION": "abc"}
    files = ("compose.yaml", "compose.gpu.yaml", "compose.evolve.yaml")
    services = yaml.safe_load(Stack(docker, tuple(tree / "docker" / file for file in files), given)("config"))[
        "services"
    ]
    server, trainer = services["slipstream"], services["trainer"]
    assert (int(server["mem_limit"]), server["cpus"], int(trainer["mem_limit"])) == (3 << 30, 1.5, 2 << 30)
    assert all({"/srv/models"} <= {volume["source"] for volume in each["volumes"]} for each in (server, trainer))
    ports = [services[name]["ports"][0] for name in ("slipstream", "prometheus", "grafana")]
    assert [(port["host_ip"], port["published"]) for port in ports] == [("0.0.0.0", str(at)) for at in (81, 82, 83)]
    assert server["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 2
    assert int(server["shm_size"]) == 1 << 30 and server["build"]["args"]["REVISION"] == "abc"
    assert services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "secret" and trainer["image"] == "x:y"
    assert "--storage.tsdb.retention.time=3d" in services["prometheus"]["command"]


def test_the_dashboard_and_the_rules(tree: Path, promtool: Path) -> None:
    folder = tree / "docker"
    grafana = folder / "grafana"
    asked = monitoring.queries(grafana / "dashboards" / "slipstream.json", folder / "prometheus" / "rules.yml")
    sources = grafana / "provisioning" / "datasources" / "prometheus.yaml"
    assert monitoring.dashboard_problems(grafana / "dashboards" / "slipstream.json", sources) == []
    rules, tests = (folder / "prometheus" / name for name in ("rules.yml", "rules_test.yml"))
    assert monitoring.rule_problems(rules, tests) == []
    assert monitoring.promtool_problems(promtool, asked, folder / "prometheus") == []


def test_the_stack_comes_up_hardened(server: Container) -> None:
    found = server.docker.inspect(server.name)
    assert found["State"]["Health"]["Status"] == "healthy"
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and found["Config"]["User"] == "10001:0"
    assert host["Memory"] == 2 << 30
    assert server.stream(QUESTION, 16).join().is_whole


def test_a_drafter_is_trained_gated_and_swapped(server: Container) -> None:
    ask_until(server, lambda: server.metric("drafter_swaps_total") >= 1)
    [live] = [each for each in json.loads(drafters(server)) if each["state"] == "live"]
    assert live["manifest"]["gate"] and live["manifest"]["training"]["tokens"] > 0
    until(lambda: drafting(server) >= live["version"], 60)


def test_every_query_finds_data(stack: Stack, server: Container, tree: Path) -> None:
    folder = tree / "docker"
    dashboard = folder / "grafana" / "dashboards" / "slipstream.json"
    asked = monitoring.queries(dashboard, folder / "prometheus" / "rules.yml")
    status, page = server.get("/metrics")
    assert status == 200 and monitoring.unknown_metrics(asked, monitoring.exposed(page)) == []
    url = stack.port("prometheus", 9090)
    wrong: list[str] = []

    def answered() -> bool:
        ask(server, 8)
        wrong[:] = monitoring.without_data(url, asked)
        return not wrong

    with contextlib.suppress(TimeoutError):
        until(answered, 60, 2)
    assert not wrong, "\n".join(wrong)
    print(f"{len(asked)} queries find data")


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_the_live_version_outlives_a_restart_and_a_kill(stack: Stack, server: Container, how: str) -> None:
    [before] = [each["version"] for each in json.loads(drafters(server)) if each["state"] == "live"]
    if how == "restart":
        server.docker("restart", "-t", "45", server.name)
    else:
        server.docker("kill", "-s", "KILL", server.name)
        until(lambda: server.state["Status"] == "exited", 30)
        server.docker("start", server.name)
    server.wait_until_ready()
    [live] = [each["version"] for each in json.loads(drafters(server)) if each["state"] == "live"]
    assert live >= before and drafting(server) >= before and server.metric("drafter_versions", state="live") == 1
    assert server.stream(QUESTION, 16).join().is_whole


@pytest.mark.slow
def test_a_trainer_of_its_own_makes_versions(stack: Stack, server: Container, tree: Path, tmp_path: Path) -> None:
    """The server left folders for a trainer; it does not train itself any more, and tries what comes of them."""
    before = newest(server)
    only_served = tmp_path / "served.yaml"
    only_served.write_text(yaml.safe_dump({"services": {"slipstream": {"environment": {"SLIPSTREAM_EVOLVE": "off"}}}}))
    hurried = tmp_path / "hurried.yaml"
    hurried.write_text(yaml.safe_dump({"services": {"trainer": {"environment": HURRIED}}}))
    files = (stack.files[0], tree / "docker" / "compose.evolve.yaml", stack.files[1], only_served, hurried)
    apart = Stack(stack.docker, files, stack.environment)
    apart.up("slipstream", "trainer")
    server = apart.container("slipstream")
    assert server.get("/metrics")[1].count("slipstream:evolution_worker_up{") == 0
    ask_until(server, lambda: newest(server) > before)
    trainer = apart.container("trainer")
    assert trainer.state["Status"] == "running" and "version" in trainer.log, trainer.log
    assert apart.docker.inspect(trainer.name)["HostConfig"]["CpuShares"] == 2
    apart("stop", "trainer")
    assert trainer.state["ExitCode"] == 0, trainer.log
