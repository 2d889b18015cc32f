"""What this process may take of the machine: in a container, less than what the machine has.

Limits are those of the control groups that the process is in, of version 1 or 2 (cgroups(7)), and of all groups above
them that can be seen. Imports no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

PROC = Path("/proc/self")
NO_LIMIT = 1 << 60
"""Version 1 writes the largest number of pages there are where there is no limit."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What control groups allow; None where they do not limit it."""

    memory: int | None = None
    """Bytes, of which ``memory_left`` can still be had: what is used up to now counts, file caches do not."""
    memory_left: int | None = None
    cpus: float | None = None
    """Cores' worth of time, for example 0.5."""

    def __str__(self) -> str:
        parts = []
        if self.memory is not None:
            parts.append(f"{self.memory / 2**20:,.0f} MiB of memory")
        if self.cpus is not None:
            parts.append(f"{self.cpus:g} cores")
        return " and ".join(parts)


def control_groups(proc: Path = PROC) -> Limits:
    """The limits of this process; those that cannot be read are none."""
    memory: list[tuple[int, int]] = []
    cpus: list[float] = []
    for group in _groups(proc):
        if (limit := _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")) and limit < NO_LIMIT:
            used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
            memory.append((limit, max(limit - max(used - _file_cache(group), 0), 0)))
        if (quota := _quota(group)) is not None:
            cpus.append(quota)
    if not memory:
        return Limits(cpus=min(cpus, default=None))
    return Limits(min(limit for limit, _ in memory), min(left for _, left in memory), min(cpus, default=None))


def free_memory() -> int:
    """Bytes that this process can still have on the host."""
    free, left = int(psutil.virtual_memory().available), control_groups().memory_left
    return free if left is None else min(free, left)


def usable_cores() -> int:
    """Threads that can compute at once: the cores this process may use, and no more than its share of time is worth."""
    cores, worth = len(os.sched_getaffinity(0)), control_groups().cpus
    return cores if worth is None else max(min(cores, math.ceil(worth)), 1)


def _groups(proc: Path) -> Iterator[Path]:
    """Folders of the process's groups, of every hierarchy that is mounted, and of those above them."""
    paths: dict[str, str] = {}
    for line in _lines(proc / "cgroup"):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        paths |= dict.fromkeys(controllers.split(","), path)  # "" is version 2
    for line in _lines(proc / "mountinfo"):
        before, _, after = line.partition(" - ")
        fields, described = before.split(), after.split()
        if len(fields) < 5 or len(described) < 3 or described[0] not in ("cgroup", "cgroup2"):
            continue
        names = {""} if described[0] == "cgroup2" else set(described[-1].split(",")) & {"memory", "cpu"}
        mount = Path(fields[4].replace("\\040", " "))
        for path in {paths[name] for name in names if name in paths}:
            # In a container the mount may show the process's own group, or one above it, as the root of all.
            inside = PurePosixPath(path)
            below = inside.relative_to(fields[3]) if inside.is_relative_to(fields[3]) else PurePosixPath()
            group = mount / below
            yield from (each for each in (group, *group.parents) if each.is_relative_to(mount) and each.is_dir())


def _quota(group: Path) -> float | None:
    """Cores' worth of time."""
    if text := _text(group / "cpu.max"):
        quota, _, period = text.partition(" ")
        return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None
    quota_us, period_us = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us else None


def _file_cache(group: Path) -> int:
    """What the kernel takes back of files before it kills anybody."""
    values = dict(line.rsplit(" ", 1) for line in _lines(group / "memory.stat") if " " in line)
    for prefix in ("total_", ""):  # version 1 counts groups below only with it, version 2 always
        found = [values.get(prefix + name, "") for name in ("active_file", "inactive_file")]
        if all(map(str.isdecimal, found)):
            return sum(map(int, found))
    return 0


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
