"""Servers in containers: as people run them, under limits, ended and killed."""

from __future__ import annotations

import re
import time

import pytest
from containers import HARDENED, Containers

pytestmark = pytest.mark.images
QUESTION = "Why is the sky blue?"


def test_it_serves_and_drains_as_any_user_without_a_right(run: Containers) -> None:
    """Read-only root, no capability, a user the image does not know; SIGTERM loses no request."""
    limits = ("--memory", "2g", "--cpus", "2", "--user", "12345:0", "--health-interval", "1s")
    server = run(*HARDENED, *limits, arguments=("--port", "9123"), port=9123).wait_until_ready()
    server.wait_until_healthy()  # the check knows a port that was chosen by option
    first = server.stream(QUESTION, 24).join()
    assert first.is_whole and first.error is None and len(first.text) > 20
    assert "limited by its control group to 2,048 MiB of memory" in server.log

    streams = [server.stream(f"{QUESTION} Answer {number}.", 100, ignore_eos=True) for number in range(4)]
    assert all(stream.started.wait(60) for stream in streams)
    began = time.monotonic()
    server.docker("stop", "-t", "45", server.name)
    took = time.monotonic() - began
    assert [(stream.join().finish_reason, stream.error) for stream in streams] == [("length", None)] * 4
    assert all(stream.is_whole for stream in streams)
    assert (server.state["ExitCode"], server.state["OOMKilled"]) == (0, False) and took < 40, server.log


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (("--memory", "700m", "--memory-swap", "700m"), "700 MiB of memory"),
        (("--cpus", "0.5", "--memory", "2g"), "0.5 cores"),
    ],
)
def test_under_limits_it_answers_or_says_what_it_needs(run: Containers, limits: tuple[str, ...], said: str) -> None:
    server = run(*HARDENED, *limits)
    try:
        server.wait_until_ready()
    except AssertionError:
        state = server.state
        assert state["Status"] == "exited" and state["ExitCode"] == 2 and not state["OOMKilled"], server.log
        assert re.search(r"needs? .*MiB", server.log) and "Traceback" not in server.log, server.log
        print(f"{limits}: {server.log.strip().splitlines()[-1]}")
        return
    assert said in server.log
    streams = [server.stream(f"{QUESTION} In {number} words.", 32) for number in range(20, 28)]
    assert all(stream.join().is_whole and stream.error is None for stream in streams)
    assert not server.state["OOMKilled"] and server.state["Status"] == "running", server.log
    print(f"{limits}: answers")
