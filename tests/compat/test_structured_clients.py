"""Clients that people use, in pinned versions and each in an environment of its own, unchanged."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream.engine.config import EngineConfig
from slipstream.server.config import ServerConfig
from slipstream.server.testing import ServerThread

HERE = Path(__file__).parent
SECONDS = 900
CLIENTS = {
    "use_openai.py": "openai==3.57.0",
    "use_instructor.py": "instructor==1.17.0",
    "use_pydantic_ai.py": "pydantic-ai-slim[openai]==2.68.0",
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of the default model in this process."""
    server = ServerThread(ServerConfig(), EngineConfig(kv_cache_memory="256MiB")).start()
    deadline = time.monotonic() + SECONDS
    while server.service.ready()[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield server.url
    server.stop()


@pytest.mark.parametrize("script", CLIENTS)
def test_it_gets_what_it_asks_for(url: str, tmp_path: Path, script: str) -> None:
    python = str(tmp_path / "bin/python")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True, timeout=SECONDS)
    subprocess.run([python, "-m", "pip", "install", "-q", CLIENTS[script]], check=True, timeout=SECONDS)
    done: Any = subprocess.run([python, str(HERE / script), url], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
