"""``slipstream gpu-check --dry-run``: every stage runs on the CPU, in an image that has only what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from slipstream.server.gpu_check.report import Report
from slipstream.server.gpu_check.stages import STAGES
from slipstream.server.gpu_check.throughput import FEW_BITS

MINUTES = 60
"""Far more than it takes on a busy machine."""
NOT_NEEDED = (
    "fastapi",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "prometheus_client",
    "aiohttp",
)
KERNELS = Path(__file__).parents[2] / "kernels/triton"
RUN = f"""
import importlib.util, sys
sys.modules.update(dict.fromkeys({NOT_NEEDED!r}))  # to import them is an error
if importlib.util.find_spec("triton"):
    sys.path.append({str(KERNELS)!r})
    import quick_interpreter
    sys.path.pop()
sys.argv[0] = "slipstream"
from slipstream.server.commands.cli import main
main()
"""


def test_every_stage_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", RUN, "gpu-check", "--dry-run", "--out", str(tmp_path)]
    command.append(f"--budget-minutes={MINUTES}")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, env=environment)
    assert done.stdout, done.stderr
    report = msgspec.json.decode((tmp_path / "gpu-check.json").read_bytes(), type=Report)
    assert done.returncode == 0 and not report.failed, done.stdout + done.stderr
    stages = {stage.name: stage for stage in report.stages}
    assert {name: stage.outcome for name, stage in stages.items()} == dict.fromkeys(stages, "ok")
    assert not any(stage.left_out for stage in stages.values())
    first, *_, last = done.stdout.splitlines()
    assert str(tmp_path) in first and not done.stderr  # and nothing but lines of its own
    count = sum(len(stage.checks) for stage in stages.values())
    assert last == f"{count} of {count} checks passed; see {tmp_path}/gpu-check.md"
    assert set(stages) == {stage.name for stage in STAGES}
    assert len(stages["kernels"].checks) > 10 and len(stages["equality"].checks) > 10
    tables = {name for stage in stages.values() for name in stage.tables}
    assert {"kernels", "ceilings", "decoding", "whole requests", "steps", "memory", "a head learns"} <= tables
    for learned in (trained := stages["drafter"].tables["a head learns"]):
        assert learned["accepted after"] and learned["swap pause ms"]
    assert len(trained) == 2, "on the CPU, and on the device, which is the same here"
    compared = stages["attention"].tables["attention backends"]
    assert {row["backend"] for row in compared} >= {"triton", "torch"} and len(stages["attention"].checks) >= 4
    steps = stages["steps"].tables["steps"]
    assert all(row["operations of torch"] for row in steps)
    assert {"8B shape", "8B shape with LoRAs"} <= {row["model"] for row in steps}
    assert "the same tokens in chunks, with LoRAs, float32" in {check.name for check in stages["equality"].checks}
    assert "the same tokens on the CPU, weights in 8 bits, float32" in {
        check.name for check in stages["equality"].checks
    }
    kept = {(row["kept"], row["streams"]) for row in stages["few bits"].tables["few bits"]}
    assert kept == {(name, count) for name in FEW_BITS for count in (1, 3)}
    programs = {row["program"] for row in stages["peers"].tables["other programs, decoding"]}
    assert programs == {"transformers"}
