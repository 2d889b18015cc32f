"""Which Slipstream this is."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path

COMMIT_FILE = "commit.txt"
"""Beside this module in what was built: see setup.py."""

DIGITS = 12


@cache
def commit() -> str | None:
    """The commit that it was built of; in a checkout, the one that is checked out. None if nobody knows."""
    built = resources.files("slipstream.server") / COMMIT_FILE
    if built.is_file():
        found = built.read_text().strip()
        return found[:DIGITS] if found and found != "unknown" else None  # as builds without a history call it
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        asked = ["git", "-C", str(root), "rev-parse", f"--short={DIGITS}", "HEAD"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def described() -> str:
    """For people."""
    found = commit()
    return version("slipstream") + (f" (commit {found})" if found else "")
