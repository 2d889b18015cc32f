"""Processes that step back, as the kernel sees them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.engine.child import LOWEST_NICE, step_back

AUTOGROUP = Path("/proc/self/autogroup")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="scheduling classes of Linux")


@pytest.mark.parametrize("own_session", [True, False])
def test_a_process_and_its_own_session_step_back_but_nobody_elses(own_session: bool) -> None:
    ours = AUTOGROUP.read_text() if AUTOGROUP.exists() else ""
    command = (sys.executable, "-c", "input()")
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=own_session) as process:
        step_back(process.pid)
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
        if ours:
            theirs = Path(f"/proc/{process.pid}/autogroup").read_text()
            assert theirs.endswith(f" nice {LOWEST_NICE}\n") if own_session else theirs == ours
        process.communicate(b"\n")
    assert os.sched_getscheduler(0) != os.SCHED_IDLE
    if ours:
        assert AUTOGROUP.read_text() == ours


def test_a_process_that_has_ended_is_no_error() -> None:
    with subprocess.Popen((sys.executable, "-c", "")) as process:
        process.wait()
    step_back(process.pid)
