"""Servers with batches are killed, and others go on with what is left."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import openai

from tests.server.batch.asking import begin, client_of, ended, lines_of, long_requests


def has_answered(client: openai.OpenAI, batch_id: str, count: int) -> bool:
    return client.batches.retrieve(batch_id).request_counts.completed >= count


def test_nothing_is_lost_or_done_twice_when_the_server_is_killed(
    start_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """Three kills in the middle, one of them of the engine alone, and a line that was half written.

    Where a machine is so fast, or so busy with something else, that a kill comes after the end, the batch is longer.
    """
    for count in (60, 240, 960):
        (folder := tmp_path / str(count)).mkdir()
        if killed_in_the_middle(start_tiny, folder, count):
            return
    raise AssertionError("no batch was long enough")


def killed_in_the_middle(start_tiny: Callable[..., Any], folder: Path, count: int) -> bool:
    options = ("--batch-folder", str(folder), "--max-running", "4")
    server = start_tiny(*options).wait_until_ready()
    with client_of(server, "unused") as client:
        batch = begin(client, long_requests(count, 120), "/v1/completions")
    for done in (5, 20, 35):
        with client_of(server, "unused") as client:
            server.wait_until(partial(has_answered, client, batch.id, done))
        if done == 20:
            server.engine.kill()
            continue
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        [output] = [path for path in (folder / "files").iterdir() if b'"response"' in path.read_bytes()[:200]]
        if output.read_bytes().count(b"\n") == count:
            return False
        with output.open("ab") as file:
            file.write(b'{"id":"batch_req_0","custom_id":"request-59","resp')
        server = start_tiny(*options).wait_until_ready()
    with client_of(server, "unused") as client:
        batch = ended(server, client, batch)
        assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", count, 0)
        found = lines_of(client, batch.output_file_id)
        assert set(found) == {f"request-{number}" for number in range(count)}
        assert all(line["response"]["body"]["usage"]["completion_tokens"] == 120 for line in found.values())
        assert batch.usage.output_tokens == 120 * count
    return True


def test_of_two_servers_on_a_folder_one_runs_the_batches_and_the_other_takes_over(
    start_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    options = ("--batch-folder", str(tmp_path), "--max-running", "2")
    first, second = (start_tiny(*options) for _ in range(2))
    first.wait_until_ready()
    second.wait_until_ready()
    with client_of(second, "unused") as client:
        batch = begin(client, long_requests(20, 200), "/v1/completions")
        second.wait_until(partial(has_answered, client, batch.id, 3))
        first.process.send_signal(signal.SIGKILL)
        batch = ended(second, client, batch)
        assert (batch.status, batch.request_counts.completed) == ("completed", 20)
        assert len(lines_of(client, batch.output_file_id)) == 20
