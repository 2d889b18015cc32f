"""Which key opens which route: whatever is not named here as one for users is opened by the admin key alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

OPEN = {
    "/health",
    "/health/",
    "/health_generate",
    "/liveness",
    "/ping",
    "/ready",
    "/metrics",
    "/version",
    "/",
    "/dashboard",
}
FOR_USERS = {
    *("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}", "/tokenize", "/detokenize"),
    *("/v1/files", "/v1/files/{name}", "/v1/files/{name}/content"),
    *("/v1/batches", "/v1/batches/{name}", "/v1/batches/{name}/cancel"),
    *("/v1/messages/batches", "/v1/messages/batches/{name}", "/v1/messages/batches/{name}/cancel"),
    *("/v1/messages/batches/{name}/results", "/v1/responses/input_tokens"),
    *("/v1/responses", "/v1/responses/{name}", "/v1/responses/{name}/cancel"),
    *("/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/tokenizer_info"),
    *("/v1/rollouts/prune", "/inference/v1/generate", "/v1/chat/completions/render", "/finish_session"),
    *("/generate/", "/chat/", "/get_sequence_logprobs/"),
    *("/generate", "/model_info", "/get_model_info", "/server_info", "/get_server_info"),
    *("/get_weight_version", "/weight_version", "/v1/loads", "/get_load", "/load"),
    *("/v1/tokenize", "/v1/detokenize", "/invocations"),
}
USER, ADMIN = {"authorization": "Bearer user-key"}, {"authorization": "Bearer admin-key"}


@pytest.fixture(scope="module")
def keyed(start_local: Callable[..., Any]) -> Any:
    server = start_local(api_key=("user-key",), admin_key=("admin-key",))
    server.headers = USER
    return server


def operations(server: Any) -> list[tuple[str, str]]:
    paths = server.get("/openapi.json")[1]["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def ask(server: Any, method: str, path: str, headers: dict[str, str]) -> int:
    """With a body that no route takes, so that nothing happens."""
    for name in ("name", "version", "other"):
        path = path.replace(f"{{{name}}}", "1")
    server.headers = headers
    try:
        body = b"[" if method == "POST" else None
        status, _, reply = server.request(
            method, path.replace("{action}", "pin"), body, {"content-type": "application/json"}
        )
    finally:
        server.headers = USER
    assert method == "GET" or path in OPEN or status >= 400, "nothing may happen"
    if status == 401:
        error = json.loads(reply)["error"]
        assert error.get("code") == "invalid_api_key" or error["type"] == "authentication_error"
    if status == 403:
        error = json.loads(reply)["error"]
        assert error.get("code") in ("wrong_key", "admin_key_required") or error["type"] == "permission_error"
    return status


def test_every_route_is_behind_its_key(keyed: Any) -> None:
    found = operations(keyed)
    assert {path for _, path in found} >= OPEN | FOR_USERS
    controls = [(method, path) for method, path in found if path not in OPEN | FOR_USERS]
    assert len(controls) > 40
    for method, path in controls:
        assert ask(keyed, method, path, {}) == 401, path
        assert ask(keyed, method, path, USER) == 403, f"{path} is opened by the key of a user"
        assert ask(keyed, method, path, ADMIN) not in (401, 403), path


def test_routes_for_users_are_closed_to_others(keyed: Any) -> None:
    for method, path in operations(keyed):
        if path in FOR_USERS:
            assert ask(keyed, method, path, {}) == 401, path
            assert ask(keyed, method, path, ADMIN) == 403, path
            assert ask(keyed, method, path, USER) not in (401, 403), path


def test_without_an_admin_key_a_server_with_keys_is_controlled_by_nobody(start_local: Callable[..., Any]) -> None:
    server = start_local(api_key=("user-key",))
    server.headers = USER
    for method, path in operations(server):
        if path not in OPEN | FOR_USERS:
            assert ask(server, method, path, USER) == 403, path
