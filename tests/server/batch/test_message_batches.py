"""/v1/messages/batches: Anthropic's dialect of the batches that /v1/batches has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.batch.asking import begin, client_of, ended

PATH = "/v1/messages/batches"


@pytest.fixture(scope="module")
def server(start_local: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("batches")
    keys = ("one=key-one", "two=key-two")
    server = start_local(batch_folder=str(folder), api_key=keys, max_running=4, max_stored_bytes=400_000)
    server.headers = {"authorization": "Bearer key-one"}
    return server


def asked(name: str, tokens: int = 4, **fields: Any) -> dict[str, Any]:
    params = {"model": "tiny-model", "max_tokens": tokens, "messages": [{"role": "user", "content": "Hello"}], **fields}
    return {"custom_id": name, "params": params}


def create(server: Any, *requests: dict[str, Any]) -> dict[str, Any]:
    status, batch = server.post(PATH, {"requests": list(requests)})
    assert status == 200, batch
    return dict(batch)


def until_ended(server: Any, batch: dict[str, Any]) -> dict[str, Any]:
    def found() -> Any:
        status, now = server.get(f"{PATH}/{batch['id']}")
        assert status == 200, now
        return now if now["processing_status"] == "ended" else None

    return dict(server.wait_until(found))


def results(server: Any, batch: dict[str, Any]) -> dict[str, Any]:
    status, headers, reply = server.request("GET", batch["results_url"], None, {})
    assert (status, headers["content-type"]) == (200, "application/x-jsonl")
    lines = [json.loads(line) for line in reply.splitlines()]
    found = {line["custom_id"]: line["result"] for line in lines}
    assert len(found) == len(lines), "an answer is there twice"
    return found


def test_answers_are_those_of_the_route_and_errors_have_its_shape(server: Any) -> None:
    tool = {"name": "f", "input_schema": {"type": "strin"}}
    requests = [
        asked("a", temperature=0, top_k=1),
        asked("wrong", tools=[tool]),
        asked("nobody")
        | {"params": {"model": "nobody", "max_tokens": 1, "messages": [{"role": "user", "content": ""}]}},
        asked("stream", stream=True),
        *(asked(f"more-{number}", 1, system="x" * 300) for number in range(40)),  # large enough for another process
    ]
    batch = create(server, *requests)
    assert batch["type"] == "message_batch" and batch["id"].startswith("msgbatch_")
    assert batch["processing_status"] == "in_progress" and batch["results_url"] is None
    assert batch["request_counts"]["processing"] == 44
    batch = until_ended(server, batch)
    assert batch["request_counts"] == {"processing": 0, "succeeded": 41, "errored": 3, "canceled": 0, "expired": 0}
    assert batch["ended_at"] >= batch["created_at"] and batch["created_at"].endswith("Z")
    found = results(server, batch)
    status, alone = server.post("/v1/messages", requests[0]["params"])
    assert found["a"]["type"] == "succeeded" and status == 200
    assert found["a"]["message"]["content"] == alone["content"] and found["a"]["message"]["type"] == "message"
    errors = {name: found[name]["error"] for name in ("wrong", "nobody", "stream")}
    assert {name: each["error"]["type"] for name, each in errors.items()} == {
        "wrong": "invalid_request_error",
        "nobody": "not_found_error",
        "stream": "invalid_request_error",
    }
    assert errors["wrong"]["type"] == "error" and "input_schema.type" in errors["wrong"]["error"]["message"]


def test_a_batch_can_be_cancelled_and_then_deleted(server: Any) -> None:
    long = [asked(f"long-{number}", 20_000) for number in range(200)]
    batch = create(server, *long)
    at = f"{PATH}/{batch['id']}"
    for method, path in (("GET", f"{at}/results"), ("DELETE", at)):
        status, _, reply = server.request(method, path, None, {})
        assert (status, json.loads(reply)["error"]["type"]) == (409, "invalid_request_error"), reply
    status, now = server.post(f"{at}/cancel", {})
    assert (status, now["processing_status"]) == (200, "canceling") and now["cancel_initiated_at"]
    batch = until_ended(server, batch)
    counts, found = batch["request_counts"], results(server, batch)
    assert (
        counts["canceled"] > 0 and counts["canceled"] + counts["succeeded"] == sum(counts.values()) == len(found) == 200
    )
    assert sum(each == {"type": "canceled"} for each in found.values()) == counts["canceled"]
    status, _, reply = server.request("DELETE", at, None, {})
    assert (status, json.loads(reply)) == (200, {"id": batch["id"], "type": "message_batch_deleted"})
    for path in (at, f"{at}/results"):
        assert server.get(path)[0] == 404
    server.wait_until_idle()


def test_pages_hold_this_dialects_batches_of_their_owner(server: Any) -> None:
    with client_of(server) as client:
        other = begin(client, [{"custom_id": "x", "method": "POST", "url": "/v1/completions",
                                "body": {"prompt": "x", "max_tokens": 1}}], "/v1/completions")  # fmt: skip
        mine = [create(server, asked("a", 1))["id"] for _ in range(3)][::-1]
        assert ended(server, client, other).id not in {
            each["id"] for each in server.get(f"{PATH}?limit=1000")[1]["data"]
        }
        assert not set(mine) & {each.id for each in client.batches.list()}
        assert server.get(f"/v1/batches/{mine[0]}")[0] == server.get(f"{PATH}/{other.id}")[0] == 404

    def page(query: str) -> tuple[list[str], bool]:
        status, found = server.get(f"{PATH}?{query}")
        ids = [each["id"] for each in found["data"]]
        assert status == 200 and [found["first_id"], found["last_id"]] == [ids[0], ids[-1]]
        return ids, found["has_more"]

    assert page("limit=2") == (mine[:2], True)
    assert page(f"limit=1&after_id={mine[1]}&beta=true") in ((mine[2:], True), (mine[2:], False))
    assert page(f"limit=1&before_id={mine[2]}") == (mine[1:2], True)
    assert page(f"limit=5&before_id={mine[2]}") == (mine[:2], False)
    assert server.get(f"{PATH}?after_id={mine[0]}&before_id={mine[1]}")[0] == 400
    server.headers = {"authorization": "Bearer key-two"}
    try:
        assert server.get(PATH)[1] == {"data": [], "has_more": False, "first_id": None, "last_id": None}
        assert server.get(f"{PATH}/{mine[0]}")[0] == 404
    finally:
        server.headers = {"authorization": "Bearer key-one"}
    for each in mine:
        until_ended(server, {"id": each})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "requests"),
        ({"requests": []}, "requests"),
        ({"requests": [{"custom_id": "a"}]}, "requests.0.params"),
        ({"requests": [{"custom_id": "", "params": {}}]}, "requests.0.custom_id"),
        ({"requests": [{"custom_id": "a", "params": [1]}]}, "requests.0.params"),
        ({"requests": [asked("a"), asked("a")]}, "requests.1.custom_id: an earlier request"),
        ({"requests": [asked("a")], "window": 5}, "window"),
    ],
)
def test_what_is_wrong_with_a_batch_is_said_at_once(server: Any, body: Any, says: str) -> None:
    status, reply = server.post(PATH, body)
    assert status == 400 and reply["error"]["type"] == "invalid_request_error" and says in reply["error"]["message"]


def test_what_there_is_no_room_for_leaves_nothing(server: Any) -> None:
    held = sum(each["bytes"] for each in server.get("/v1/files")[1]["data"])
    status, reply = server.post(PATH, {"requests": [asked("a", system="x" * 400_000)]})
    assert status == 400 and "--max-stored-bytes" in reply["error"]["message"]
    assert sum(each["bytes"] for each in server.get("/v1/files")[1]["data"]) == held


def test_a_server_without_a_folder_has_none(start_local: Callable[..., Any], tmp_path: Path) -> None:
    status, reply = start_local().post(PATH, {"requests": [asked("a")]})
    assert status == 409 and "--batch-folder" in reply["error"]["message"]
