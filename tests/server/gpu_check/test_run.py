"""A check survives whatever becomes of its stages, and says of each what became of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from slipstream.server.gpu_check.report import Report, StageReport

HERE = Path(__file__).parent
SECONDS = 1800


def scenario(name: str, folder: Path, *options: str) -> Report:
    command = [sys.executable, "-P", str(HERE / "scenarios.py"), name, str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return msgspec.json.decode((folder / "gpu-check.json").read_bytes(), type=Report)


def test_a_stage_that_goes_wrong_costs_no_other_one_anything(tmp_path: Path) -> None:
    report = scenario("many_ends", tmp_path)
    stages = {stage.name: stage for stage in report.stages}
    assert list(stages) == ["machine", "troubled", "hanging", "stuck", "late", "wrong", "broken", "absent", "too long"]
    assert {name: stage.outcome for name, stage in stages.items()} == {
        "machine": "ok",
        "troubled": "failed",
        "hanging": "failed",
        "stuck": "failed",
        "late": "ok",
        "wrong": "failed",
        "broken": "failed",
        "absent": "not there",
        "too long": "left out",
    }
    troubled = stages["troubled"]
    assert list(troubled.errors) == ["fails", "is killed"] and "this went wrong" in troubled.errors["fails"]
    assert troubled.errors["is killed"] == "its process was ended by SIGSEGV"
    assert troubled.notes == ["is not there: not there: somebody forgot it"]
    assert troubled.tables == {"found": [{"what it is": "the last part", "count": 3}]}
    assert stages["hanging"].errors == {"hangs": "took longer than there was time"} and stages["hanging"].checks
    assert stages["stuck"].errors == {"hangs": "hangs: ended after 0.5 s"} and stages["stuck"].checks
    assert stages["late"].left_out == ["comes too late"]
    assert [check.found for check in stages["wrong"].checks] == ["5"] and stages["wrong"].targets[0].passed is None
    assert "the engine did not start" in stages["broken"].errors["the stage"]
    assert stages["absent"].reason == "nobody asked for it"
    assert "10000 s at least" in stages["too long"].reason
    assert report.failed == ["troubled", "hanging", "stuck", "wrong", "broken"]

    page = (tmp_path / "gpu-check.md").read_text()
    assert "A dry run" in page and report.date in page and report.commit in page
    assert "| absent | the stage absent | not there: nobody asked for it | " in page
    assert "- **two and two**: 5 (wanted: 4)" in page and "- **fails** failed: ValueError: this went wrong" in page
    assert "| speed | at least 0.8 | 0.5 | not judged |" in page
    assert "No time was left for: comes too late." in page
    assert "| what it is | count |\n|---|---|\n| the last part | 3 |" in page
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_second_run_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    """With what it has found: nothing is measured twice, and what is set up in vain is set up again."""
    first = scenario("twice", tmp_path)
    assert [stage.outcome for stage in first.stages] == ["ok", "failed", "ok", "failed", "left out"]
    second = scenario("twice", tmp_path, "--resume")
    stages = {stage.name: stage for stage in second.stages}
    assert [stage.outcome for stage in second.stages] == ["ok", "failed", "failed", "ok", "not there"]
    assert stages["wrong"].checks == first.stages[1].checks and len(stages["wrong"].targets) == 1
    assert not stages["late"].left_out and "this went wrong" in stages["late"].errors["comes too late"]
    assert stages["known"].tables == {"known": [{"figure": 42.0}]} and not stages["known"].errors
    assert second.kept == {"a figure": 42.0}


@pytest.mark.parametrize(
    ("name", "stage", "found"),
    [("wrong_kernel", "kernels", "silu_mul"), ("wrong_acceptance", "equality", "the same tokens with a head")],
)
def test_what_computes_wrongly_is_found(name: str, stage: str, found: str, tmp_path: Path) -> None:
    report = scenario(name, tmp_path)
    assert report.failed == [stage]
    failed: StageReport = report.stages[-1]
    assert any(check.name.startswith(found) and not check.passed for check in failed.checks), failed


def test_stages_need_not_be_forked(tmp_path: Path) -> None:
    """Where this process has used a GPU, its forks cannot."""
    report = scenario("spawned", tmp_path)
    assert report.failed == ["wrong", "broken"] and "device" in report.machine
    assert "the engine did not start" in report.stages[-1].errors["the stage"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be checked")
def test_without_a_gpu_there_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "slipstream.server", "gpu-check", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("slipstream: gpu-check needs a GPU, and torch sees none here; --dry-run")
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "out").exists()
