"""schemathesis over the OpenAPI document: what the server says of itself is so, whatever it is sent.

All checks, with valid and with invalid data. One of them is told more: a body that fits its schema may be refused with
400 all the same, since a schema does not say all (fields that exclude each other, the length of the context, …).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("schemathesis")

USER, ADMIN = "user-key", "admin-key"
SECONDS = 1800
STANDS_STILL = (
    *("/pause", "/sleep", "/release_memory_occupation", "/release_kv_cache_memory", "/pause_generation"),
    *("/admin/v1/pause", "/admin/v1/sleep", "/debug/profile", "/admin/v1/groups/join"),
)
"""Control routes after which the engine, or the answer, waits for somebody; tried where nobody generates."""
GENERATING = "^/(v1|generate|inference|chat|tokenize|detokenize|get_sequence_logprobs|finish_session)"


def config(folder: Path, examples: int) -> Path:
    path = folder / "schemathesis.toml"
    accepted = ["2xx", "3xx", "400", "401", "403", "404", "405", "409", "413", "415", "429"]
    path.write_text(
        f"""
[generation]
max-examples = {examples}
database = "none"

[checks]
positive_data_acceptance.expected-statuses = {json.dumps(accepted)}

[auth.openapi]
userKey = {{ bearer = "{USER}" }}
userKeyHeader = {{ api_key = "{USER}" }}
adminKey = {{ bearer = "{ADMIN}" }}
"""
    )
    return path


def check(server: Any, folder: Path, examples: int, *options: str, document: str = "") -> None:
    """Fails with what schemathesis found."""
    found = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "schemathesis.cli", "--config-file", str(config(folder, examples)), "run"),
            *(document or f"{server.url}/openapi.json", "--url", server.url, "--checks", "all", "--mode", "all"),
            *("--header", f"Authorization: Bearer {USER}") if not document else (),
            *("--no-color", "--seed", "1", "--request-timeout", "60", *options),
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=folder,
    )
    assert found.returncode == 0, found.stdout[-12_000:] + found.stderr[-2000:]


@pytest.fixture(scope="module")
def described(start_local: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("described")
    server = start_local(
        **{"api_key": (USER,), "admin_key": (ADMIN,), "max_model_len": 256, "max_n": 4, "request_timeout_s": 30.0},
        **{"registry": str(folder / "registry"), "evolve": "off", "speculation": "ngram"},
        **{"traffic_log": "tokens", "traffic_folder": str(folder / "traffic"), "max_queued_requests": 4096},
    )
    server.headers = {"authorization": f"Bearer {USER}"}
    return server


def test_routes_for_users(described: Any, tmp_path: Path) -> None:
    check(described, tmp_path, 4, "--phases", "examples,fuzzing", "--include-path-regex", GENERATING)
