"""Damaged files are an answer of the admin API and a line of the command line, never a traceback."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.drafter.registry.registry import DATABASE_FILE, Registry
from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.drafter.traffic.index import TrafficIndex
from slipstream.engine.config import EngineConfig
from slipstream.server.admin.routes import ask, statistics, with_traffic
from slipstream.server.config import ServerConfig
from slipstream.server.errors import UnavailableError
from slipstream.server.launch import start_process
from slipstream.server.service import Service

RUBBISH = b"rubbish" * 1000


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    folder = Registry(tmp_path / "registry").folder
    (folder / DATABASE_FILE).write_bytes(RUBBISH)
    return folder


@pytest.fixture
def traffic(tmp_path: Path) -> Path:
    TrafficIndex(tmp_path / "traffic", create=True).close()
    (tmp_path / "traffic" / "index.sqlite").write_bytes(RUBBISH)
    return tmp_path / "traffic"


def test_the_admin_api(registry: Path, traffic: Path) -> None:
    service = Service(
        ServerConfig(), EngineConfig(), TrafficConfig(traffic_log="tokens", traffic_folder=str(traffic)), start_process
    )
    opened = Registry(registry, open_now=False)
    for call, code, folder in (
        (ask(with_traffic, service, statistics), "traffic_unusable", traffic),
        (ask(with_traffic, service, lambda index: index.purge("a")), "traffic_unusable", traffic),
        (ask(opened.list), "registry_unusable", registry),
        (ask(opened.promote, 1, "why"), "registry_unusable", registry),
        (ask(opened.prune, 1), "registry_unusable", registry),
    ):
        with pytest.raises(UnavailableError, match="not a database") as caught:
            asyncio.run(call)
        assert caught.value.code == code and caught.value.status == 503 and str(folder) in caught.value.message


def test_the_command_line(registry: Path, traffic: Path) -> None:
    for command in (
        ["drafter", "list", "--registry", str(registry)],
        ["drafter", "prune", "--keep", "1", "--registry", str(registry)],
        ["traffic", "purge", "--all", "--folder", str(traffic)],
    ):
        line = [sys.executable, "-P", "-m", "slipstream.server", *command]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 2 and "not a database" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
