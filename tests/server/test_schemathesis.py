"""schemathesis over the OpenAPI document: what the server says of itself is so, whatever it is sent.

All checks, with valid and with invalid data. One of them is told more: a body that fits its schema may be refused with
400 all the same, since a schema does not say all (fields that exclude each other, the length of the context, …).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream.server.http.description import PARTS

pytest.importorskip("schemathesis")

USER, ADMIN = "user-key", "admin-key"
SECONDS = 3000
GENERATING = r"^/(v1/(?!(un)?load_lora)|generate|inference|chat/|tokenize|detokenize|get_sequence|health)"
"""Routes that need an engine which computes; others may stop it, and are tried on another server."""
WAITING = (
    r"^/(admin/v1/groups/join|(areal_)?init_weights_update_group|init_weight_transfer_engine|init_communicator/"
    r"|debug/profile|admin/v1/target/receive)$"
)
"""Routes that wait for somebody else as long as they are told to: they get what is wrong only."""
ACCEPTED = ["2xx", "3xx", "400", "401", "403", "404", "405", "409", "413", "415", "429", "503", "504"]
REFUSED = ["400", "401", "403", "404", "405", "409", "413", "415", "429", "503", "504"]


def without_optional_fields(document: dict[str, Any]) -> dict[str, Any]:
    """Those of bodies; answers have theirs all the same."""
    schemas = document["components"]["schemas"]
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    names = PARTS.findall(json.dumps([operation.get("requestBody") for operation in operations]))
    seen = set(names)
    while names:
        schema = schemas[names.pop()]
        if "properties" in schema:
            needed = schema.get("required", ())
            schema["properties"] = {name: found for name, found in schema["properties"].items() if name in needed}
        new = set(PARTS.findall(json.dumps(schema))) - seen
        seen |= new
        names += new
    return document


def check(server: Any, folder: Path, examples: int, *options: str, seed: int = 1, bare: bool = False) -> None:
    """Fails with what schemathesis found."""
    document = server.get("/openapi.json")[1]
    (folder / "openapi.json").write_text(json.dumps(without_optional_fields(document) if bare else document))
    (folder / "schemathesis.toml").write_text(
        f"""
suppress-health-check = ["too_slow"]
[generation]
max-examples = {examples}
database = "none"
[[operations]]
include-path-regex = {json.dumps(WAITING)}
generation.mode = "negative"
[checks]
max_response_time = {SECONDS}
positive_data_acceptance.expected-statuses = {json.dumps(ACCEPTED)}
negative_data_rejection.expected-statuses = {json.dumps(REFUSED)}
[auth.openapi]
userKey = {{ bearer = "{USER}" }}
userKeyHeader = {{ api_key = "{USER}" }}
adminKey = {{ bearer = "{ADMIN}" }}
"""
    )
    command = [
        *(sys.executable, "-P", "-m", "schemathesis.cli", "run", "openapi.json", "--url", server.url),
        *("--checks", "all", "--mode", "all", "--no-color", "--seed", str(seed), "--request-timeout", "90", *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=folder)
    assert done.returncode == 0, re.sub(r"(.{2000}).*", r"\1 …", done.stdout)[-15_000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def start(start_local: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    def start() -> Any:
        folder = tmp_path_factory.mktemp("described")
        server = start_local(
            **{"api_key": (USER,), "admin_key": (ADMIN,), "max_model_len": 256, "max_n": 4, "request_timeout_s": 600.0},
            **{"registry": str(folder / "registry"), "speculation": "ngram", "max_queued_requests": 4096},
            **{"traffic_log": "tokens", "traffic_folder": str(folder / "traffic")},
            batch_folder=str(folder / "batches"),
        )
        server.headers = {"authorization": f"Bearer {USER}"}
        return server

    return start


@pytest.fixture(scope="module")
def described(start: Callable[[], Any]) -> Any:
    return start()


@pytest.mark.slow
def test_a_little_of_every_route(described: Any, tmp_path: Path) -> None:
    generating = ("--include-path-regex", GENERATING)
    check(described, tmp_path, 3, "--phases", "examples,fuzzing", *generating)
    check(described, tmp_path, 3, "--phases", "examples,fuzzing", "--exclude-path-regex", GENERATING)


@pytest.mark.slow
@pytest.mark.parametrize("bare", [False, True])
def test_all_that_users_may_ask(start: Callable[[], Any], tmp_path: Path, bare: bool) -> None:
    check(start(), tmp_path, 100, "--include-path-regex", GENERATING, bare=bare)


@pytest.mark.slow
@pytest.mark.parametrize("bare", [False, True])
def test_all_that_controls(start: Callable[[], Any], tmp_path: Path, bare: bool) -> None:
    server = start()
    check(server, tmp_path, 100, "--exclude-path-regex", GENERATING, bare=bare)
    server.headers = {"authorization": f"Bearer {ADMIN}"}
    assert server.post("/admin/v1/wake", {})[0] == server.post("/admin/v1/resume", {})[0] == 200
    server.headers = {"authorization": f"Bearer {USER}"}
    assert server.complete("x", max_tokens=1)["usage"]["completion_tokens"] == 1
