"""Child processes as the kernel sees them: they step back, and never outlive who started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from slipstream.engine.child import LOWEST_NICE, EarlyChild, command, step_back
from slipstream.engine.early import EarlyProcess

AUTOGROUP = Path("/proc/self/autogroup")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="scheduling classes of Linux")


@pytest.mark.parametrize("own_session", [True, False])
def test_a_process_and_its_own_session_step_back_but_nobody_elses(own_session: bool) -> None:
    ours = AUTOGROUP.read_text() if AUTOGROUP.exists() else ""
    before = os.sched_getscheduler(0)  # the lowest itself where tests are run beside other work
    command = (sys.executable, "-c", "input()")
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=own_session) as process:
        step_back(process.pid)
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
        if ours:
            theirs = Path(f"/proc/{process.pid}/autogroup").read_text()
            assert theirs.endswith(f" nice {LOWEST_NICE}\n") if own_session else theirs == ours
        process.communicate(b"\n")
    assert os.sched_getscheduler(0) == before
    if ours:
        assert AUTOGROUP.read_text() == ours


def test_a_process_that_has_ended_is_no_error() -> None:
    with subprocess.Popen((sys.executable, "-c", "")) as process:
        process.wait()
    step_back(process.pid)


BUSY = command("timeit", "-n", "1000000000000", "pass")
"""Keeps a processor busy until it is killed, or who started it has ended, in whatever way."""
PARENT = """
import subprocess, sys, time
from slipstream.engine.child import command
children = [subprocess.Popen(command("sleepy", priority=p), start_new_session=True) for p in ("normal", "lowest")]
print(*(child.pid for child in children), flush=True)
if sys.argv[1:] == ["stay"]:
    time.sleep(600)
"""
SLEEPY = """
import os, sys, threading, time
held = bytearray(64 << 20)
print("up", os.getpid(), flush=True)
def burn():
    while True:
        pass
threading.Thread(target=burn, daemon=True).start()
burn()
"""


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def gone(pids: list[int], seconds: float = 300.0) -> float:
    """How long it took until none of them ran any more."""
    began = time.monotonic()
    while any(map(runs, pids)):
        assert time.monotonic() - began < seconds, [pid for pid in pids if psutil.pid_exists(pid)]
        time.sleep(0.01)
    return time.monotonic() - began


def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    return os.environ | {"PYTHONPATH": str(tmp_path)}


def start_parent(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = (sys.executable, "-c", PARENT, *arguments)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(tmp_path))


@pytest.mark.parametrize("load", [0, pytest.param(8, marks=pytest.mark.slow)])
def test_children_do_not_outlive_a_killed_parent(tmp_path: Path, load: int) -> None:
    busy = [subprocess.Popen(BUSY, start_new_session=True) for _ in range(load)]
    try:
        with start_parent(tmp_path, "stay") as parent:
            assert parent.stdout is not None
            pids = list(map(int, parent.stdout.readline().split()))
            assert {parent.stdout.readline().strip() for _ in pids} == {f"up {pid}" for pid in pids}
            ours = os.sched_getscheduler(0)  # which is the lowest itself where tests are run beside other work
            assert [os.sched_getscheduler(pid) for pid in pids] == [ours, os.SCHED_IDLE]
            [reaper] = psutil.Process(pids[1]).children()
            assert os.sched_getscheduler(reaper.pid) == ours
            parent.kill()
            took = gone([*pids, reaper.pid], 20 if load else 300)
            print(f"beside {load} busy processes the children were gone after {took:.2f} s")
            # Nothing holds the pipe either: whoever reads it to its end is not kept waiting.
            parent.stdout.read()
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_a_parent_that_ends_at_once_leaves_none(tmp_path: Path) -> None:
    for _ in range(3):
        with start_parent(tmp_path) as parent:
            assert parent.stdout is not None
            gone(list(map(int, parent.stdout.readline().split())))


def test_the_reaper_ends_with_its_child(tmp_path: Path) -> None:
    with start_parent(tmp_path, "stay") as parent:
        assert parent.stdout is not None
        pids = list(map(int, parent.stdout.readline().split()))
        parent.stdout.readline(), parent.stdout.readline()
        [reaper] = psutil.Process(pids[1]).children()
        os.kill(pids[1], signal.SIGKILL)
        gone([reaper.pid])
        parent.kill()


TOLD = """
import os, sys
if __name__ == "__main__":
    os.write(int(sys.argv[1]), " ".join(["runs", *sys.argv[2:]]).encode())
else:
    os.write(int(os.environ["TELL"]), b"imported ")
"""


@pytest.mark.parametrize("arguments", [("some", "arguments"), ()])
def test_an_early_child_imports_before_it_is_told_what_to_do(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "told.py").write_text(TOLD)
    reads, writes = os.pipe()
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TELL": str(writes)}
    child = EarlyChild("told", environment, writes)
    assert os.read(reads, 100) == b"imported "
    assert child.process.poll() is None
    child.tell(str(writes), *arguments)
    os.close(writes)
    assert child.process.wait(300) == 0
    with os.fdopen(reads, "rb") as pipe:
        assert pipe.read().decode() == " ".join(["runs", *arguments])


def test_an_early_child_that_is_told_nothing_ends(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(TOLD)
    reads, writes = os.pipe()
    child = EarlyChild("told", os.environ | {"PYTHONPATH": str(tmp_path), "TELL": str(writes)}, writes)
    os.close(writes)
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.process.wait(300) == 0
    with os.fdopen(reads, "rb") as pipe:
        assert pipe.read() == b"imported "


def test_a_server_that_cannot_start_leaves_no_process() -> None:
    with pytest.raises(ValueError, match="no such model"), EarlyProcess("json") as early:
        raise ValueError("no such model")
    assert not psutil.pid_exists(early.pid) and early.channel.fileno() == -1


def test_to_tell_a_child_that_was_killed_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(TOLD)
    reads, writes = os.pipe()
    child = EarlyChild("told", os.environ | {"PYTHONPATH": str(tmp_path), "TELL": str(writes)}, writes)
    child.process.kill()
    assert child.process.wait(300) == -signal.SIGKILL
    child.tell("nobody is there")
    os.close(reads)
    os.close(writes)
