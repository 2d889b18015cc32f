"""kill -9 at random moments: always readable, and no half-written version can be loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def kill_writers(folder: Path, kills: int, seed: int) -> int:
    """Versions that were written meanwhile."""
    script = Path(__file__).with_name("kill_loop.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), str(kills), str(seed)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_writers_are_killed(tmp_path: Path) -> None:
    assert kill_writers(tmp_path / "registry", kills=12, seed=0) > 12


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_writers_are_killed(tmp_path: Path, seed: int) -> None:
    assert kill_writers(tmp_path / "registry", kills=100, seed=1000 * seed) > 100
