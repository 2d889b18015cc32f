"""Every launch compiles for the GPUs there are, within their registers and their shared memory; without one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SECONDS = 4 * 3600
"""Only against what never ends: all formats on all targets take a quarter of an hour where nothing else runs."""


def compiled(request: pytest.FixtureRequest, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """Rows of ``scripts/kernel_resources.py``. In another process: in this one, kernels are interpreted."""
    file = tmp_path / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # What has been compiled once from the same source is found there by the next run.
    environment["TRITON_CACHE_DIR"] = str(request.config.cache.mkdir("triton"))  # type: ignore[union-attr]
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "scripts/kernel_resources.py"), f"--json={file}", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert file.exists(), done.stderr
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    problems = [f"{row['target']}, {row['case']}, {row['kernel']}: {row['problem']}" for row in rows if row["problem"]]
    assert not problems, "\n".join([*problems, done.stderr])
    assert done.returncode == 0
    return rows


def test_kernels_fit_hopper_and_blackwell(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """All large ones on Hopper, on Blackwell attention, which has the largest programs; the next test has them all."""
    rows = compiled(request, tmp_path, "--target=sm_90", "--important")
    rows += compiled(request, tmp_path, "--target=sm_100", "--important", "--only=attention")
    for target in ("sm_90", "sm_100"):
        of_target = [row for row in rows if row["target"] == target]
        assert {row["tokens"] for row in of_target} and all(row["registers"] > 0 for row in of_target)
        # Two chunks of 64 keys and values of 128 numbers: one that is computed, and one that is on its way.
        decoding = [row["shared"] for row in of_target if row["case"].startswith("attention decode")]
        assert max(decoding) >= 2 * 2 * 64 * 128 * 2, "keys and values are not asked for ahead"


@pytest.mark.slow
def test_kernels_fit_all_targets_in_all_formats_and_sizes(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    rows = compiled(request, tmp_path, "--all-formats")
    assert {row["target"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}


def test_a_kernel_that_asks_for_too_much_is_found(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("wasteful.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["modest"] == [""]
    [spills], [shared] = found["spills"], found["shared"]
    assert spills.startswith("spills ") and "bytes of shared memory, of 232448" in shared


def test_what_is_compiled_depends_neither_on_requests_nor_on_how_many_rows_there_are(
    request: pytest.FixtureRequest,
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(request.config.cache.mkdir("triton"))  # type: ignore[union-attr]
    command = [sys.executable, str(Path(__file__).with_name("variants.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kernels = {"distribution_kernel", "race_kernel", "argmax_kernel", "change_kernel", "allow_only_kernel"}
    assert kernels | {"logprobs_kernel"} <= set(found["before"]) and found["after"] == []
    assert sorted(found["rows"]) == ["gated_kernel", "rms_norm_kernel", "rms_norm_kernel"]
