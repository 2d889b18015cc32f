"""Lets tests of images import what lies beside them, and the script that renders the chart."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parents[1] / "docker" / "helm")]


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Only with ``-m images``, as `make images` has it: they need packages that other tests do without."""
    wanted = re.search(r"(?<!not )\bimages\b", config.getoption("markexpr"))
    return None if wanted else True
