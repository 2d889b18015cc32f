"""What a process in a container may take: control groups of both versions, as they look from inside and outside."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine import limits
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.limits import Limits, control_groups, free_memory, usable_cores
from slipstream.engine.models import cache_size, loader
from slipstream.engine.testing.local import TINY_LLAMA

MIB = 1 << 20
NONE_OF_VERSION_1 = "9223372036854771712"


class Machine:
    """Folders like /proc/self and /sys/fs/cgroup."""

    def __init__(self, root: Path) -> None:
        self.proc, self.groups = root / "proc", root / "cgroup"
        self.proc.mkdir()
        self._mounts: list[str] = []
        self._paths: list[str] = []

    def mount(self, name: str, kind: str, options: str, root: str = "/") -> Path:
        folder = self.groups / name
        folder.mkdir(parents=True)
        self._mounts.append(f"32 31 0:29 {root} {folder} rw,relatime - {kind} {kind} {options}")
        return folder

    def enter(self, controllers: str, path: str) -> None:
        self._paths.append(f"{len(self._paths)}:{controllers}:{path}")

    def limits(self) -> Limits:
        (self.proc / "cgroup").write_text("".join(line + "\n" for line in self._paths))
        (self.proc / "mountinfo").write_text("".join(line + "\n" for line in self._mounts))
        return control_groups(self.proc)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def write(folder: Path, **files: str | int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        prefix = "cpu." if name in ("max", "cfs_quota_us", "cfs_period_us") else "memory."
        (folder / (prefix + name.replace("memory_", ""))).write_text(f"{content}\n")


STAT = f"anon {300 * MIB}\ninactive_file {40 * MIB}\nactive_file {60 * MIB}\nslab 5\n"


def test_version_2_in_a_container_that_sees_only_its_group(machine: Machine) -> None:
    root = machine.mount("unified", "cgroup2", "rw")
    machine.enter("", "/")
    write(root, memory_max=1200 * MIB, current=500 * MIB, stat=STAT, max="50000 100000")
    assert machine.limits() == Limits(1200 * MIB, 800 * MIB, 0.5)
    assert str(machine.limits()) == "1,200 MiB of memory and 0.5 cores"


def test_version_2_from_outside_with_a_tighter_group_above(machine: Machine) -> None:
    root = machine.mount("unified", "cgroup2", "rw")
    machine.enter("", "/kubepods/pod1/container")
    write(root / "kubepods", memory_max="max", max="max 100000")
    write(root / "kubepods/pod1", memory_max=600 * MIB, current=550 * MIB, stat="", max="150000 100000")
    write(root / "kubepods/pod1/container", memory_max=800 * MIB, current=100 * MIB, stat="", max="400000 100000")
    assert machine.limits() == Limits(600 * MIB, 50 * MIB, 1.5)


@pytest.mark.parametrize("root", ["/docker/abc", "/"])
def test_version_1_whether_or_not_the_mount_shows_the_container_as_the_root(machine: Machine, root: str) -> None:
    memory, cpu = machine.mount("memory", "cgroup", "rw,memory", root), machine.mount("cpu", "cgroup", "rw,cpu", root)
    for controllers in ("memory", "cpu,cpuacct", "name=systemd"):
        machine.enter(controllers, "/docker/abc")
    own = (memory, cpu) if root != "/" else (memory / "docker/abc", cpu / "docker/abc")
    write(memory, limit_in_bytes=NONE_OF_VERSION_1, usage_in_bytes=MIB, stat="")
    total = "".join(f"total_{line}\n" for line in STAT.splitlines())
    write(own[0], limit_in_bytes=700 * MIB, usage_in_bytes=650 * MIB, stat="inactive_file 7\nactive_file 7\n" + total)
    write(own[1], cfs_quota_us=250_000, cfs_period_us=100_000)
    assert machine.limits() == Limits(700 * MIB, 150 * MIB, 2.5)


def test_without_limits_there_are_none(machine: Machine) -> None:
    assert machine.limits() == Limits()
    write(machine.mount("memory", "cgroup", "rw,memory"), limit_in_bytes=NONE_OF_VERSION_1, usage_in_bytes=5)
    write(machine.mount("cpu", "cgroup", "rw,cpu"), cfs_quota_us=-1, cfs_period_us=100_000)
    machine.mount("unified", "cgroup2", "rw")
    for controllers in ("memory", "cpu", ""):
        machine.enter(controllers, "/gone/since")
    assert machine.limits() == Limits()
    assert str(machine.limits()) == ""


@given(st.lists(st.text(max_size=40), max_size=4), st.lists(st.text(max_size=60), max_size=4), st.text(max_size=20))
def test_whatever_the_files_hold_it_is_no_error(
    tmp_path_factory: pytest.TempPathFactory, cgroup: list[str], mounts: list[str], content: str
) -> None:
    machine = Machine(tmp_path_factory.mktemp("odd"))
    root = machine.mount("unified", "cgroup2", "rw")
    machine.enter("", "/")
    machine._paths += cgroup
    machine._mounts += mounts
    for name in ("memory.max", "memory.current", "memory.stat", "cpu.max", "cpu.cfs_quota_us"):
        (root / name).write_text(content, errors="surrogatepass")
    machine.limits()


@pytest.mark.parametrize(("cpus", "cores"), [(None, 4), (0.5, 1), (1.0, 1), (1.5, 2), (3.0, 3), (64.0, 4)])
def test_threads_are_what_there_is_time_for(monkeypatch: pytest.MonkeyPatch, cpus: float | None, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(limits, "control_groups", lambda: Limits(cpus=cpus))
    assert usable_cores() == cores


def test_free_memory_is_the_tighter_of_host_and_group(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free_memory()
    monkeypatch.setattr(limits, "control_groups", lambda: Limits(64 * MIB, 5 * MIB))
    assert free_memory() == 5 * MIB < whole
    monkeypatch.setattr(limits, "control_groups", lambda: Limits(1 << 50, 1 << 49))
    assert free_memory() < 1 << 49


def test_what_does_not_fit_says_what_it_needs_and_what_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    config = EngineConfig(model=str(tmp_path), load_format="dummy")
    monkeypatch.setattr(cache_size, "control_groups", lambda: Limits(700 * MIB, 350 * MIB))
    monkeypatch.setattr(loader, "available_memory", lambda _: 350 * MIB)
    said = r"needs 400\.\d MiB .*else 400\.0 MiB.*350\.0 MiB are free .*is limited to 700\.0 MiB.*--quantize"
    with pytest.raises(ModelError, match=said):
        loader.load_model(config)
    monkeypatch.setattr(loader, "available_memory", lambda _: 500 * MIB)
    with pytest.raises(ModelError, match=r"99\.\d MiB of memory are left .*limited to 700\.0 MiB"):
        loader.load_model(dataclasses.replace(config, kv_cache_memory="200MiB"))


@contextlib.contextmanager
def real_groups(**values: str) -> Iterator[list[Path]]:
    """Groups of this machine, of whichever version; skips the test where they cannot be made."""
    root, name = Path("/sys/fs/cgroup"), f"slipstream-test-{os.getpid()}"
    one = (root / "cgroup.controllers").exists()
    parents = {root} if one else {root / file.partition(".")[0] for file in values}
    made: list[Path] = []
    try:
        for parent in parents:
            (parent / name).mkdir()
            made.append(parent / name)
        for file, value in values.items():
            [folder] = [group for group in made if one or group.parent.name == file.partition(".")[0]]
            (folder / file).write_text(value)
    except OSError as error:
        pytest.skip(f"no control groups can be made here: {error}")
    else:
        yield made
    finally:
        for group in made:
            with contextlib.suppress(OSError):
                group.rmdir()


def test_a_process_in_a_real_group_finds_its_limits() -> None:
    version_2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    memory = {"memory.max" if version_2 else "memory.limit_in_bytes": str(300 * MIB)}
    quota = {"cpu.max": "50000 100000"} if version_2 else {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}
    program = (
        "import sys, pathlib\n"
        "for group in sys.argv[1:]: (pathlib.Path(group) / 'cgroup.procs').write_text('0')\n"
        "from slipstream.engine.limits import control_groups, free_memory, usable_cores\n"
        "print(control_groups(), '/', free_memory() >> 20, '/', usable_cores())"
    )
    with real_groups(**memory, **quota) as groups:
        command = [sys.executable, "-P", "-c", program, *map(str, groups)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    said, free, cores = done.stdout.split(" / ")
    assert said == "300 MiB of memory and 0.5 cores"
    assert 200 < int(free) < 300 and int(cores) == 1
