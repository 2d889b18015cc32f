"""Kills writers of a registry at random moments and looks at what they left; a script, run by test_registry_kills.py.

Arguments: folder, how many writers to kill, seed. It forks, so it must run no threads.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from slipstream.drafter.head import layout
from slipstream.drafter.head.layout import HeadConfig
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import RegistryError
from slipstream.engine.errors import SlipstreamError

HEAD = HeadConfig(64, 64, 1, 1, 64, 256, 64, (1, 2, 3), 1e-5, {"rope_type": "default", "rope_theta": 1e4}, 64)
LONGEST_LIFE_S = 0.06
"""A handful of rounds of a writer."""


def write_until_told(folder: Path, seed: int, added: int) -> None:
    """Adds, promotes, tries canaries, rolls back and prunes; ends after SIGTERM, and fails if anything else fails.

    A byte goes to ``added``, a pipe, for every version.
    """
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    rng = random.Random(seed)
    tensors = layout.random_tensors(HEAD, seed)
    while not told:
        registry = Registry(folder)
        try:
            version = registry.add(HEAD, tensors, target="A", origin="trained").version
            os.write(added, b".")
            registry.start_canary(version) if rng.random() < 0.5 else registry.promote(version)
            if rng.random() < 0.3:
                registry.roll_back()
            if rng.random() < 0.3:
                registry.prune(rng.randrange(3))
        except RegistryError:
            pass  # the other writer was there first
    os._exit(0)


def start_writer(folder: Path, seed: int) -> tuple[int, int]:
    """Its process, and the end of the pipe where a byte comes for every version that it has added."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_until_told(folder, seed, writes)
        finally:
            os._exit(1)
    os.close(writes)
    return child, reads


def check(folder: Path) -> int:
    """How many versions there are; each is either whole or unknown."""
    registry = Registry(folder)
    for each in registry.list():
        try:
            registry.open_version(each.version, "A")
        except SlipstreamError:
            assert registry.get(each.version).state == "pruned"  # by the survivor, a moment ago
    for state in ("live", "canary"):
        assert sum(each.state == state for each in registry.list()) <= 1
    return len(registry.list(pruned=True))


def check_at_rest(folder: Path) -> None:
    """With no writer left, the folders are those of the versions."""
    registry = Registry(folder)
    versions = registry.list()
    for each in versions:
        registry.open_version(each.version, "A")
    assert set((folder / "versions").iterdir()) == {registry.path(each.version) for each in versions}
    assert [each.version for each in registry.list(pruned=True)] == sorted({e.version for e in registry.history()})


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    rng = random.Random(seed)
    Registry(folder)
    survivor, added = start_writer(folder, seed)
    for number in range(kills):
        if number == kills // 2:
            # From here on the killed writer is the only one, and its leftovers stay until the next one opens.
            for _ in range(kills):  # however slow the machine
                assert os.read(added, 1), "the survivor ended by itself"
            os.kill(survivor, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(survivor, 0)[1]) == 0, "the survivor was disturbed"
        writer, pipe = start_writer(folder, seed + number + 1)
        if number % 2:  # else it may be killed while it begins
            assert os.read(pipe, 1), "the writer ended by itself"
        time.sleep(rng.uniform(0, LONGEST_LIFE_S))
        os.kill(writer, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL, "the writer failed by itself"
        os.close(pipe)
        count = check(folder)
    check_at_rest(folder)
    print(count)


if __name__ == "__main__":
    main()
