"""kill -9 at random moments: always readable, and no half-written version can be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forking import Forks

LOOP = """
import runpy, sys
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def kill_writers(forks: Forks, folder: Path, kills: int, seed: int) -> int:
    """Versions that were written meanwhile."""
    script = Path(__file__).with_name("kill_loop.py")
    with forks.start(LOOP, str(script), str(folder), str(kills), str(seed)) as loop:
        told = loop.stdout.read()
        assert loop.wait(300) == 0, loop.stderr.read()
    return int(told)


def test_writers_are_killed(tmp_path: Path, forks: Forks) -> None:
    assert kill_writers(forks, tmp_path / "registry", kills=12, seed=0) > 12


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_writers_are_killed(tmp_path: Path, forks: Forks, seed: int) -> None:
    assert kill_writers(forks, tmp_path / "registry", kills=100, seed=1000 * seed) > 100
