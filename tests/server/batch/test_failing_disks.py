"""What disks do to batches: they fill up, lose what was written, and are gone for a while; batches outlive it."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from slipstream.server.batch import lines
from slipstream.server.batch.lines import AnswerLine, Progress, ResponseOfLine, check, pieces
from slipstream.server.batch.store import BatchStore

URL = "/v1/completions"


def answer(custom_id: str) -> AnswerLine:
    return AnswerLine("batch_req_1", custom_id, ResponseOfLine(200, "batch_req_1", msgspec.Raw(b"{}")))


def requests(count: int, tokens: int) -> bytes:
    body = {"prompt": "x", "max_tokens": tokens, "ignore_eos": True}
    found = [{"custom_id": str(number), "method": "POST", "url": URL, "body": body} for number in range(count)]
    return b"".join(json.dumps(each).encode() + b"\n" for each in found)


def begin(client: openai.OpenAI, content: bytes) -> Any:
    file = client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")


def ended(server: Any, client: openai.OpenAI, batch_id: str) -> Any:
    ends = ("completed", "failed", "cancelled", "expired")
    server.wait_until(lambda: client.batches.retrieve(batch_id).status in ends)
    return client.batches.retrieve(batch_id)


def client_of(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_what_is_written_after_a_full_disk_is_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, write = Progress(tmp_path / "output", tmp_path / "errors"), os.write
    with monkeypatch.context() as full, pytest.raises(OSError, match="No space left"):
        full.setattr(lines.os, "write", lambda file, data: write(file, data[:20]))
        progress.write(answer("a"))
    progress.write(answer("b"))  # by a thread that nobody could stop
    progress.close()
    again = Progress(tmp_path / "output", tmp_path / "errors")
    assert again.done == {"b"}
    again.close()


@pytest.mark.parametrize("damage", [b"\0" * 30 + b"\n", b'{"id":"batch_req_1","cus{"id":"x"}\n', b"\xff\n", b"{}\n"])
def test_answers_behind_one_that_cannot_be_read_are_asked_for_again(tmp_path: Path, damage: bytes) -> None:
    first, second = (lines.encode(answer(name)) + b"\n" for name in "ab")
    (tmp_path / "output").write_bytes(first + damage + second)
    progress = Progress(tmp_path / "output", tmp_path / "errors")
    assert (progress.done, progress.counts.completed) == ({"a"}, 1)
    progress.write(answer("b"))
    progress.close()
    assert (tmp_path / "output").read_bytes() == first + second


def test_lines_without_end_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"a" * 10**6 + b"\n" + b" " * 500 + b"b\n\ncc\r\n" + b"d" * 10**6)
    found = [each for piece in pieces(path, 100) for each in piece]
    assert [number for number, _ in found] == [1, 2, 4, 5]
    assert found[2] == (4, b"cc") and all(100 < len(line) < 200 for number, line in found if number != 4)
    _, problems, _ = check(path, URL, 100)
    assert [(each.code, each.line) for each in problems[:2]] == [("request_too_large", 1), ("request_too_large", 2)]


def test_lines_that_are_empty_count_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(requests(1, 1) + b"\n" * (lines.MOST_FILE_LINES - 1))
    assert check(path, URL, 1000)[:2] == (1, [])
    path.write_bytes(requests(1, 1) + b"\n" * 10**6)
    _, [problem], _ = check(path, URL, 1000)
    assert (problem.code, problem.line) == ("too_many_tasks", lines.MOST_FILE_LINES + 1)


def test_an_upload_without_room_is_told_where_it_needs_some(
    start_local: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_local(batch_folder=str(tmp_path / "batches"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with client_of(server) as client, pytest.raises(openai.APIStatusError) as told:
        client.files.create(file=("in.jsonl", io.BytesIO(b"x" * 2**21)), purpose="batch")
    assert (told.value.status_code, told.value.code) == (503, "storage_unusable")
    assert "TMPDIR" in told.value.message and str(tmp_path / "gone") in told.value.message


def test_a_folder_that_was_gone_for_a_while_goes_on(
    start_local: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the others to end, too, opens a file each second."""
    running, failures = BatchStore.running, [OSError(5, "Input/output error"), ValueError("what nobody expects")]

    @contextmanager
    def gone_at_first(store: BatchStore) -> Iterator[bool]:
        if failures:
            raise failures.pop(0)
        with running(store) as is_mine:
            yield is_mine

    monkeypatch.setattr(BatchStore, "running", gone_at_first)
    server = start_local(batch_folder=str(tmp_path / "batches"))
    with client_of(server) as client:
        batch = ended(server, client, begin(client, requests(2, 1)).id)
    assert batch.status == "completed" and not failures
    told = [line for line in server.log if "batches" in line]
    assert "Input/output error" in told[0] and str(tmp_path) in told[0]
    assert "batches go on" in told[-1]


def test_a_batch_on_a_full_disk_says_where_room_is_needed_and_when_it_goes_on(
    start_local: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slipstream.server.batch.runner.LATEST_RETRY_S", 0.25)
    write, failures = Progress.write, [OSError(28, "No space left on device")]

    def full_at_first(progress: Progress, line: AnswerLine) -> None:
        if failures:
            raise failures.pop()
        write(progress, line)

    monkeypatch.setattr(Progress, "write", full_at_first)
    server = start_local(batch_folder=str(tmp_path / "batches"))
    with client_of(server) as client:
        batch = ended(server, client, begin(client, requests(3, 1)).id)
    assert (batch.status, batch.request_counts.completed) == ("completed", 3)
    [told] = [line for line in server.log if "stands still" in line]
    assert "No space left" in told and f"{tmp_path / 'batches'} is tried again in 0.25 s" in told


def test_a_batch_whose_input_is_lost_fails_and_keeps_its_answers(
    start_local: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "batches"
    server = start_local(batch_folder=str(folder), max_running=2)
    with client_of(server) as client:
        batch = begin(client, requests(400, 100))
        other = begin(client, requests(400, 100))
        server.wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 2)
    server.stop()
    for lost in (batch, other):
        (folder / "files" / lost.input_file_id).unlink()
    server = start_local(batch_folder=str(folder), max_running=2)
    with client_of(server) as client:
        batch = ended(server, client, batch.id)
        assert batch.status == "failed" and batch.errors.data[0].code == "input_file_lost"
        answers = client.files.content(batch.output_file_id).text.splitlines()
        assert batch.request_counts.completed == len(answers) >= 2
        assert ended(server, client, other.id).status == "failed"


def test_what_people_say_is_readable_by_the_owner_only(start_local: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "batches"
    server = start_local(batch_folder=str(folder))
    with client_of(server) as client:
        ended(server, client, begin(client, requests(2, 1)).id)
    found = [path for path in folder.rglob("files/*") if path.is_file()]
    assert len(found) == 2 and all(path.stat().st_mode & 0o777 == 0o600 for path in found)
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in (folder, folder / "files"))
    server.wait_until(lambda: b'slipstream:disk_free_bytes{model_name="' in server.request("GET", "/metrics")[2])
    assert b'store="batches"' in server.request("GET", "/metrics")[2]
