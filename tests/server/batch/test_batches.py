"""/v1/files and /v1/batches, driven by the OpenAI client unchanged; answers are what the routes give by themselves."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.batch.asking import WINDOW, begin, client_of, ended, jsonl, lines_of, long_requests, request, upload

KEYS = ("one=key-one", "two=key-two")


@pytest.fixture(scope="module")
def server(start_local: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("batches")
    server = start_local(
        batch_folder=str(folder / "batches"),
        api_key=KEYS,
        admin_key=("admin-key",),
        max_running=4,
        max_file_bytes=100_000,
        max_stored_bytes=400_000,
        traffic_log="tokens",
        traffic_folder=str(folder / "traffic"),
    )
    server.headers = {"authorization": "Bearer key-one"}
    return server


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "temperature": 0},
    "/v1/completions": {"prompt": ["Once", "Twice"], "max_tokens": 5, "temperature": 0},
    "/v1/embeddings": {"input": "Hello", "dimensions": 4},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 5, "temperature": 0},
}


@pytest.mark.parametrize("url", BODIES)
def test_answers_are_those_of_the_route(server: Any, client: openai.OpenAI, url: str) -> None:
    body = BODIES[url]
    batch = begin(client, [request(0, url, **body), request(1, url, **body)], url)
    assert batch.status == "validating" and batch.metadata == {"name": "nightly"}
    batch = ended(server, client, batch)
    assert batch.status == "completed" and batch.error_file_id is None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (2, 2, 0)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at <= batch.expires_at
    alone = server.post(url, body)[1]
    found = lines_of(client, batch.output_file_id)
    assert set(found) == {"request-0", "request-1"}
    for line in found.values():
        assert line["id"].startswith("batch_req_") and line["error"] is None
        response = line["response"]
        assert response["status_code"] == 200 and response["request_id"]
        for said in ("choices", "data", "output"):
            assert without_ids(response["body"].get(said)) == without_ids(alone.get(said))
    used = alone["usage"]
    tokens = (
        used.get("input_tokens", used.get("prompt_tokens")),
        used.get("output_tokens", used.get("completion_tokens", 0)),
    )
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (2 * tokens[0], 2 * tokens[1])


def without_ids(found: Any) -> Any:
    if isinstance(found, list):
        return [without_ids(each) for each in found]
    if isinstance(found, dict):
        return {name: without_ids(value) for name, value in found.items() if name != "id"}
    return found


def test_requests_that_fail_have_a_file_of_their_own(server: Any, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "x"}]
    wrong = [
        request(1, messages=messages, max_tokens=-2),
        request(2, messages=messages, model="another"),
        request(3, messages=messages, stream=True),
    ]
    batch = ended(server, client, begin(client, [request(0), *wrong]))
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 3)
    assert set(lines_of(client, batch.output_file_id)) == {"request-0"}
    failed = lines_of(client, batch.error_file_id)
    assert [failed[f"request-{number}"]["response"]["status_code"] for number in (1, 2, 3)] == [400, 404, 400]
    params = [failed[f"request-{number}"]["response"]["body"]["error"]["param"] for number in (1, 2, 3)]
    assert params == ["max_tokens", "model", "stream"]


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b'{"custom_id": "b", "method": "POST"}', "invalid_request", None),
        (
            b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}',
            "duplicate_custom_id",
            "custom_id",
        ),
        (b'{"custom_id": "b", "method": "GET", "url": "/v1/completions", "body": {}}', "invalid_method", "method"),
        (b'{"custom_id": "b", "method": "POST", "url": "/v1/embeddings", "body": {}}', "invalid_url", "url"),
        (b'{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": []}', "invalid_body", "body"),
        (
            b'{"custom_id": "", "method": "POST", "url": "/v1/completions", "body": {}}',
            "invalid_custom_id",
            "custom_id",
        ),
    ],
)
def test_a_file_that_is_wrong_fails_before_anything_is_computed(
    server: Any, client: openai.OpenAI, line: bytes, code: str, param: str | None
) -> None:
    good = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}'
    batch = client.batches.create(
        input_file_id=upload(client, good + b"\n\n" + line), endpoint="/v1/completions", completion_window=WINDOW
    )
    batch = ended(server, client, batch)
    assert batch.status == "failed" and batch.output_file_id is None
    [problem] = batch.errors.data
    assert (problem.code, problem.param, problem.line) == (code, param, 3)


def test_an_empty_file_fails(server: Any, client: openai.OpenAI) -> None:
    batch = ended(server, client, begin(client, []))
    assert batch.status == "failed" and [each.code for each in batch.errors.data] == ["empty_file"]


def test_files_can_be_listed_read_and_deleted(server: Any, client: openai.OpenAI) -> None:
    content = jsonl([request(0)])
    first = client.files.create(
        file=("in.jsonl", io.BytesIO(content)), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    second = client.files.create(file=("other.jsonl", io.BytesIO(content)), purpose="batch")
    assert (first.filename, first.bytes, first.purpose, first.status) == (
        "in.jsonl",
        len(content),
        "batch",
        "processed",
    )
    assert first.expires_at == first.created_at + 3600
    assert client.files.retrieve(first.id) == first
    assert client.files.content(first.id).content == content
    listed = [each.id for each in client.files.list(purpose="batch")]
    assert listed.index(second.id) < listed.index(first.id)
    assert [each.id for each in client.files.list(limit=1)] == [each.id for each in client.files.list()]
    assert client.files.delete(first.id).deleted
    for missing in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError):
            missing(first.id)
    assert not (Path(server.service.config.batch_folder) / "files" / first.id).exists()


def test_batches_are_listed_in_pages(server: Any, client: openai.OpenAI) -> None:
    made = [ended(server, client, begin(client, [request(0)])).id for _ in range(3)]
    page = client.batches.list(limit=2)
    assert [each.id for each in page.data] == made[:0:-1] and page.has_more
    assert [each.id for each in client.batches.list(limit=1)][:3] == made[::-1]


def test_what_is_wrong_with_a_request_is_said(server: Any, client: openai.OpenAI) -> None:
    form = {"content-type": "multipart/form-data; boundary=b"}
    part = b'--b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    file = part % (b"file", b'; filename="a"', b"{}")

    def sent(*parts: bytes, headers: dict[str, str] = form) -> tuple[int, Any]:
        status, _, reply = server.request("POST", "/v1/files", b"".join(parts) + b"--b--\r\n", headers)
        error = json.loads(reply).get("error", {})
        return status, (error.get("code"), error.get("param"))

    batch, other = part % (b"purpose", b"", b"batch"), part % (b"purpose", b"", b"fine-tune")
    assert sent(file, batch)[0] == 200
    assert sent(file) == (400, ("missing_required_parameter", "purpose"))
    assert sent(batch) == (400, ("missing_required_parameter", "file"))
    assert sent(file, other) == (400, ("invalid_value", "purpose"))
    assert sent(file, batch, batch) == (400, ("invalid_value", "purpose"))
    assert sent(file, batch, part % (b"more", b"", b"x")) == (400, ("unknown_parameter", "more"))
    assert sent(file, batch, part % (b"expires_after[seconds]", b"", b"5"))[0] == 400
    assert sent(part % (b"file", b'; filename="a"', b"x" * 100_001), batch) == (413, ("body_too_large", None))
    assert sent(file, batch, headers={"content-type": "multipart/form-data"})[1][0] == "invalid_form"
    assert sent(file, batch, headers={"content-type": "application/json"})[0] == 415
    with pytest.raises(openai.BadRequestError) as refused:
        begin(client, [request(0)], window="1 day")
    assert refused.value.param == "completion_window"
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.create(input_file_id="file-0", endpoint="/v1/responses", completion_window=WINDOW)
    assert refused.value.param == "input_file_id"
    for path in ("/v1/files?limit=0", "/v1/files?order=x", "/v1/batches?limit=101", "/v1/files?more=1"):
        assert server.get(path)[0] == 400
    assert server.get("/v1/batches?after=batch_0")[0] == 404


def test_a_tenant_has_only_so_much_room(server: Any) -> None:
    with client_of(server, "key-two") as client:
        for _ in range(4):
            upload(client, b"x" * 100_000)
        with pytest.raises(openai.BadRequestError, match="400000"):
            upload(client, b"x")
        for each in client.files.list():
            client.files.delete(each.id)


def test_another_tenant_sees_nothing(server: Any, client: openai.OpenAI) -> None:
    batch = ended(server, client, begin(client, [request(0)]))
    with client_of(server, "key-two") as other:
        for file_id in (batch.input_file_id, batch.output_file_id):
            for method in (other.files.retrieve, other.files.content, other.files.delete):
                with pytest.raises(openai.NotFoundError):
                    method(file_id)
        for ask in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                ask(batch.id)
        with pytest.raises(openai.BadRequestError, match="there is no file"):
            other.batches.create(
                input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window=WINDOW
            )
        with pytest.raises(openai.NotFoundError):
            other.batches.list(after=batch.id)
        assert [each.id for each in other.files.list()] == [each.id for each in other.batches.list()] == []


def test_its_requests_are_their_owners_and_are_kept_to_learn_from(server: Any, client: openai.OpenAI) -> None:
    before = kept(server)
    body = {"prompt": "Once upon a time", "max_tokens": 4, "user": "alice"}
    lines = [request(number, "/v1/completions", **body) for number in range(3)]
    ended(server, client, begin(client, lines, "/v1/completions"))
    server.wait_until(lambda: kept(server).get("one/alice", 0) == before.get("one/alice", 0) + 3)
    quiet = openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="key-one",
        default_headers={"X-Slipstream-Traffic": "off"},
    )
    ended(server, client, begin(quiet, [request(9, "/v1/completions", **body | {"user": "bob"})], "/v1/completions"))
    ended(server, client, begin(client, [request(9, "/v1/completions", **body | {"user": "eve"})], "/v1/completions"))
    server.wait_until(lambda: "one/eve" in kept(server))
    assert "one/bob" not in kept(server)


def kept(server: Any) -> dict[str, int]:
    server.headers = {"authorization": "Bearer admin-key"}
    try:
        status, found = server.get("/admin/v1/traffic")
    finally:
        server.headers = {"authorization": "Bearer key-one"}
    assert status == 200, found
    return {name: tenant["samples"] for name, tenant in found["tenants"].items()}


def test_a_batch_can_be_cancelled(server: Any, client: openai.OpenAI) -> None:
    short = request(100, "/v1/completions", prompt="x", max_tokens=1)
    batch = begin(client, [short, *long_requests(8, 20_000)], "/v1/completions")
    server.wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 1)
    with pytest.raises(openai.ConflictError):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = ended(server, client, batch)
    assert batch.status == "cancelled" and batch.cancelling_at <= batch.cancelled_at
    assert set(lines_of(client, batch.output_file_id)) == {"request-100"}
    left = lines_of(client, batch.error_file_id)
    assert len(left) == batch.request_counts.failed == 8
    assert {(line["response"], line["error"]["code"]) for line in left.values()} == {(None, "batch_cancelled")}
    assert client.batches.cancel(batch.id).status == "cancelled"
    server.wait_until_idle()


def test_a_batch_that_takes_too_long_expires(server: Any, client: openai.OpenAI) -> None:
    batch = ended(server, client, begin(client, long_requests(8, 30_000), "/v1/completions", "1s"))
    assert batch.status == "expired" and batch.expired_at >= batch.expires_at
    left = lines_of(client, batch.error_file_id)
    assert {line["error"]["code"] for line in left.values()} == {"batch_expired"} and len(left) == 8
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_the_queue_of_others_has_room_beside_a_batch(start_local: Callable[..., Any], tmp_path: Path) -> None:
    """More requests than rows and queue, yet an interactive request is let in, and begins before the batch ends."""
    server = start_local(batch_folder=str(tmp_path), max_running=2, max_queued_requests=0)
    with client_of(server, "unused") as client:
        batch = begin(client, long_requests(4, 20_000), "/v1/completions")
        server.wait_until(lambda: server.metric("num_requests_running") == 2)
        assert server.complete("Hello", max_tokens=3)["usage"]["completion_tokens"] == 3
        assert client.batches.retrieve(batch.id).status == "in_progress"
        client.batches.cancel(batch.id)
        ended(server, client, batch)


def test_a_server_without_a_folder_has_none(start_local: Callable[..., Any]) -> None:
    server = start_local()
    for path in ("/v1/files", "/v1/batches", "/v1/files/x/content"):
        status, found = server.get(path)
        assert (status, found["error"]["code"]) == (409, "no_batches")
