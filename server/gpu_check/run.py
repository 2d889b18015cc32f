"""Runs the stages: each in a process of its own, whose end, whatever its kind, is the end of that stage alone."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from slipstream.engine.errors import ConfigError
from slipstream.kernels.triton import launch
from slipstream.server.gpu_check.context import Context, NotThere, Options, Stage
from slipstream.server.gpu_check.report import Finding, Report, StageReport, read, targets, write

WHOLE = "the stage"
"""What errors are called that are of no part."""
GRACE_S = 20.0
"""A part that is under way at the end of its stage's time is given so much more."""


def run(options: Options, stages: Sequence[Stage]) -> Report:
    """Raises ConfigError where there is nothing to check: no GPU, and no dry run."""
    return Check(options).run(stages)


class Check:
    """One run. This process only starts others and writes: it never touches the GPU, so that none can take it along."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._ends = time.monotonic() + options.budget_s
        self.start = "fork"
        """How processes start: forks share what is imported, but cannot use a GPU that this process has used."""
        asked = {"budget": f"{options.budget_s / 60:g} min", "compare": " ".join(options.compare) or "nothing"}
        self.report = Report(
            date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            version=_version(),
            commit=_commit(),
            options={**asked, "model": options.model or "embedded"},
            dry_run=options.dry_run,
        )
        self._before = {stage.name: stage for stage in self._taken_up()}

    def _taken_up(self) -> list[StageReport]:
        """Stages of the run before, whose figures are known from now on."""
        found = read(self.options.out) if self.options.resume else None
        if found is None:
            return []
        if (found.commit, found.dry_run) != (self.report.commit, self.options.dry_run):
            raise ConfigError(
                f"--resume: the report in {self.options.out} is of commit {found.commit}"
                f"{', a dry run' if found.dry_run else ''}; this is {self.report.commit}: give another --out"
            )
        self.report.kept = found.kept
        return found.stages

    def run(self, stages: Sequence[Stage]) -> Report:
        launch.keep_kernels()  # once for all stages, so that what one has compiled is there for the others
        describing, *others = stages
        self._before.pop(describing.name, None)
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            self._run(describing, Path(folder) / describing.name)
            if not self.options.dry_run and "device" not in self.report.machine:
                raise ConfigError(
                    "gpu-check needs a GPU, and torch sees none here; --dry-run runs every stage on the CPU instead"
                )
            self.options.out.mkdir(parents=True, exist_ok=True)
            for stage in others:
                if not self.options.only or stage.name in self.options.only:
                    self._run(stage, Path(folder) / stage.name)
                elif (found := self._before.get(stage.name)) is not None:
                    self.report.stages.append(found)
        self._write()
        return self.report

    def _run(self, stage: Stage, scratch: Path) -> None:
        scratch.mkdir()
        found = self._begun(stage)
        self.report.stages.append(found)
        left = self._ends - time.monotonic()
        if found.outcome != "left out" and not found.left_out and WHOLE not in found.errors:
            print(f"{stage.name}: {found.outcome}, by the run before", flush=True)
            return
        if left < stage.least_s:
            found.reason = f"{max(left, 0):.0f} s were left, and it takes {stage.least_s:.0f} s at least"
        else:
            began = time.monotonic()
            found.left_out, found.reason = [], ""
            found.errors.pop(WHOLE, None)
            Running(self, stage, found, min(began + stage.most_s, self._ends), scratch).run()
            found.seconds += round(time.monotonic() - began, 1)
            bad = bool(found.errors) or not all(check.passed for check in found.checks)
            absent = found.reason or (found.notes and not (found.tables or found.checks or found.targets))
            found.outcome = "failed" if bad else "not there" if absent else "ok"
        self._write()
        why = f": {found.reason}" if found.reason else ""
        print("\n".join([f"{stage.name}: {found.outcome}{why} ({found.seconds:.1f} s)", *targets(found)]), flush=True)

    def _begun(self, stage: Stage) -> StageReport:
        """What is known of a stage; what was not there may be now."""
        found = self._before.get(stage.name)
        if found is None or found.outcome == "not there":
            return StageReport(name=stage.name, title=stage.title)
        return found

    def take(self, found: StageReport, told: tuple[Any, ...]) -> None:
        """What the process of a stage tells."""
        match told:
            case "machine", facts:
                self.report.machine = facts
            case "row", name, cells:
                found.tables.setdefault(name, []).append(cells)
            case "check", name, passed, seen, wanted:
                found.checks.append(Finding(name=name, passed=passed, found=seen, wanted=wanted))
            case "target", name, reached, seen, wanted:
                found.targets.append(Finding(name=name, passed=reached, found=seen, wanted=wanted))
            case "note", text:
                found.notes.append(text)
            case "keep", name, value:
                self.report.kept[name] = value
            case "begin", part:
                found.done.append(part)
            case "left out", part:
                found.left_out.append(part)
            case "not there", "", reason:
                found.reason = reason
            case "not there", part, reason:
                found.notes.append(f"{part}: not there: {reason}")
            case "error", part, error:
                found.errors[part or WHOLE] = error
                print(f"{found.name}, {part}: {error}", flush=True)
            case "end", _:
                self._write()

    @property
    def kept(self) -> dict[str, float]:
        return dict(self.report.kept)

    def _write(self) -> None:
        if self.options.out.is_dir():
            write(self.report, self.options.out)


class Running:
    """A stage under way. A process that ends within a part is followed by another one, for the parts after it."""

    def __init__(self, check: Check, stage: Stage, found: StageReport, deadline: float, scratch: Path) -> None:
        self._check, self._stage, self._found = check, stage, found
        self._deadline, self._scratch = deadline, scratch
        self._part_ends = 0.0

    def run(self) -> None:
        while not self._run_process():
            pass

    def _wait_s(self, part: str | None) -> float:
        """How long to wait for word of a process that is at this part, or between two."""
        ends = self._deadline + GRACE_S
        return max(min(ends, self._part_ends) - time.monotonic() if part else ends - time.monotonic(), 0)

    def _run_process(self) -> bool:
        """Whether there is nothing left to do."""
        start = multiprocessing.get_context(self._check.start)
        ours, theirs = start.Pipe(duplex=False)
        process: Any = start.Process(target=self._work, args=(theirs,))  # type: ignore[attr-defined]
        process.start()
        theirs.close()
        part: str | None = None
        try:
            while ours.poll(self._wait_s(part)):
                told = ours.recv()
                if told[0] == "done":
                    return True
                if told[0] == "cannot fork":
                    self._check.start = "spawn"
                    return False
                if told[0] == "begin":
                    part, self._part_ends = told[1], time.monotonic() + self._stage.part_s
                elif told[0] == "end":
                    part = None
                self._check.take(self._found, told)
            if part is None or time.monotonic() >= self._deadline + GRACE_S:
                self._check.take(self._found, ("error", part, "took longer than there was time"))
                self._check.take(self._found, ("left out", "what comes after that"))
                return True
            self._check.take(self._found, ("error", part, f"hangs: ended after {self._stage.part_s:g} s"))
            return False
        except EOFError:
            process.join(GRACE_S)
            if part is not None:
                self._check.take(self._found, ("error", part, _how_it_ended(process.exitcode)))
                return False
            if process.exitcode:
                self._check.take(self._found, ("error", "", _how_it_ended(process.exitcode)))
            return bool(process.exitcode != LOST)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # what it may have started, too
            process.join(GRACE_S)  # one that the driver holds does not end
            ours.close()

    def _work(self, connection: Connection) -> None:
        """In the process of the stage."""
        os.setpgid(0, 0)
        gc.freeze()  # what is imported stays, and need not be looked through with every engine that ends
        if self._check.options.dry_run:
            torch.set_num_threads(1)  # tiny shapes are not worth a second one
        send = connection.send
        if not self._check.options.dry_run and torch.cuda._is_in_bad_fork():
            send(("cannot fork",))
            return
        context = Context(self._check.options, send, self._deadline, self._check.kept, self._scratch)
        try:
            if context.on_gpu and not torch.cuda.is_available():
                raise NotThere("torch sees no GPU")
            for part in self._stage.parts(context):
                if part.name in self._found.done:
                    continue
                if context.left() <= 0:
                    send(("left out", part.name))
                    continue
                send(("begin", part.name))
                try:
                    part.run()
                    if context.on_gpu:
                        torch.cuda.synchronize()
                except NotThere as reason:
                    send(("not there", part.name, str(reason)))
                except Exception:
                    send(("error", part.name, traceback.format_exc()))
                    if context.on_gpu:
                        _leave_if_lost(part.name, send)
                send(("end", part.name))
            send(("done",))
        except NotThere as reason:
            send(("not there", "", str(reason)))
            send(("done",))
        except Exception:
            send(("error", "", traceback.format_exc()))
            send(("done",))


LOST = 9
"""Status of a process that can do nothing more with its GPU, while another one may."""


def _leave_if_lost(part: str, send: Any) -> None:
    """After an illegal access, every call of the same process fails."""
    try:
        torch.cuda.synchronize()
    except Exception:
        send(("end", part))
        os._exit(LOST)


def _how_it_ended(status: int | None) -> str:
    if status is None:
        return "its process neither answers nor ends"
    return f"its process was ended by {signal.Signals(-status).name}" if status < 0 else f"it ended with {status}"


def _version() -> str:
    try:
        return version("slipstream")
    except PackageNotFoundError:  # the packages were only unpacked
        return "not installed"


def _commit() -> str:
    here = Path(__file__).resolve().parent
    asked = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
