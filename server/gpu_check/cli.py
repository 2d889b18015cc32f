"""``slipstream gpu-check``: its options. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from slipstream.engine.errors import ConfigError


def gpu_check(
    out: Annotated[Path, typer.Option(help="Folder for gpu-check.json and gpu-check.md.")] = Path("gpu-check"),
    budget_minutes: Annotated[
        float, typer.Option(min=0.1, help="No stage begins for which too little of these is left.")
    ] = 9.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Every stage on the CPU, with tiny shapes.")] = False,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Also measure this program with the same shapes: transformers, vllm or sglang; may be given several "
            "times."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A small real model, as for serve; by default the embedded one where it is installed."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this stage; may be given several times.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the report in --out ends: only what it has not.")
    ] = False,
) -> None:
    """Check and measure this machine's GPU: kernels, whole engine, speed. Needs no network.

    Stages run in the order of their value, each in a process of its own; results are written after every part of one,
    so a run that is cut off has lost nothing. The exit status is 1 if a stage failed, 2 if nothing could be checked.
    """
    # Before torch is imported: whether there is a GPU can be asked without using it, which forks would not survive.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler tells of every start and stop otherwise
    # Before kernels are imported: they are for the one or the other then.
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    from slipstream.server.gpu_check.context import Options  # imports torch
    from slipstream.server.gpu_check.peers import PROGRAMS
    from slipstream.server.gpu_check.run import run
    from slipstream.server.gpu_check.stages import STAGES, unhurried

    check_names("--only", only, [stage.name for stage in STAGES])
    check_names("--compare", compare, list(PROGRAMS))
    options = Options(out, budget_minutes * 60, dry_run, tuple(compare or ()), model, tuple(only or ()), resume)
    what = "tiny shapes on the CPU" if dry_run else f"at most {budget_minutes:g} minutes"
    typer.echo(f"{len(only or STAGES)} stages, {what}; results so far are always in {out}")
    report = run(options, [unhurried(stage) for stage in STAGES] if dry_run else STAGES)
    passed = [bool(check.passed) for stage in report.stages for check in stage.checks]
    failed = f"; failed: {', '.join(report.failed)}" if report.failed else ""
    left = [stage.name for stage in report.stages if stage.outcome == "left out" or stage.left_out]
    if left:
        typer.echo(f"No time was left for all of {', '.join(left)}: the same command with --resume goes on there.")
    typer.echo(f"{sum(passed)} of {len(passed)} checks passed{failed}; see {out}/gpu-check.md")
    if report.failed:
        raise typer.Exit(1)


def check_names(option: str, asked: list[str] | None, known: list[str]) -> None:
    if unknown := [name for name in asked or () if name not in known]:
        raise ConfigError(f"{option} {unknown[0]}: there are {', '.join(known)}")
