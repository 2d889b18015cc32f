"""Checks in which something goes wrong, run by ``test_run.py`` in a process of its own: stages are forked from it.

    python scenarios.py NAME FOLDER [--resume]

Writes the report of the check into the folder; the exit status is 0 as long as the check itself survives.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import inf
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

from slipstream.engine.speculation.tree import Tree
from slipstream.kernels import ops
from slipstream.server.gpu_check import run as running
from slipstream.server.gpu_check.context import Context, NotThere, Options, Part, Stage
from slipstream.server.gpu_check.stages import STAGES, unhurried

AMPLE_S = 9000.0


def stage(name: str, parts: Callable[[Context], Iterable[Part]], least_s: float = 0, part_s: float = inf) -> Stage:
    return Stage(name, f"the stage {name}", parts, least_s, AMPLE_S, part_s)


def fails() -> None:
    raise ValueError("this went wrong")


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def is_not_there() -> None:
    raise NotThere("somebody forgot it")


def troubled(context: Context) -> Iterator[Part]:
    yield Part("fails", fails)
    yield Part("is killed", is_killed)
    yield Part("is not there", is_not_there)
    yield Part("hangs", lambda: time.sleep(0))
    yield Part("goes on", lambda: context.row("found", what_it_is="the last part", count=3))


def hanging(context: Context) -> Iterator[Part]:
    yield Part("first", lambda: context.check("a check", True, "seen", "seen"))
    yield Part("hangs", lambda: time.sleep(600))


def stuck(context: Context) -> Iterator[Part]:
    yield Part("hangs", lambda: time.sleep(600))
    yield Part("goes on", lambda: context.check("a check", True, "seen", "seen"))


def late(context: Context) -> Iterator[Part]:
    yield Part("takes all the time", lambda: setattr(context, "_deadline", time.monotonic()))
    yield Part("comes too late", fails)


def wrong(context: Context) -> Iterator[Part]:
    yield Part("judges", lambda: context.check("two and two", False, "5", "4"))
    yield Part("aims", lambda: context.target("speed", 0.5, at_least=0.8))
    yield Part("keeps", lambda: context.keep("a figure", 42.0))


def broken(context: Context) -> Iterator[Part]:
    if context.kept != {"a figure": 42.0}:
        raise AssertionError("what a stage before has kept is not known")
    raise RuntimeError("the engine did not start")
    yield


def absent(context: Context) -> Iterator[Part]:
    raise NotThere("nobody asked for it")
    yield


def many_ends() -> tuple[Stage, ...]:
    return (
        STAGES[0],
        stage("troubled", troubled),
        stage("hanging", hanging),
        stage("stuck", stuck, part_s=0.5),
        stage("late", late),
        stage("wrong", wrong),
        stage("broken", broken),
        stage("absent", absent),
        stage("too long", troubled, least_s=10_000),
    )


def wrong_kernel() -> tuple[Stage, ...]:
    """What it computes is off by a thousandth."""
    right = ops.silu_mul
    ops.silu_mul = lambda gate, up: right(gate, up) * 1.001
    return only("kernels", "silu_mul")


def wrong_acceptance() -> tuple[Stage, ...]:
    """The first draft token is taken for right, whatever was sampled at its place."""
    right = Tree.accepted
    Tree.accepted = lambda self, sampled: right(self, sampled) or [0]  # type: ignore[method-assign]
    return only("equality", "with a head")


def spawned() -> tuple[Stage, ...]:
    """As where the processes of stages cannot be forked."""
    return (STAGES[0], stage("wrong", wrong), stage("broken", broken))


def only(name: str, part: str) -> tuple[Stage, ...]:
    """One stage, and of that the parts of this name, whatever follows a comma in it."""
    [found] = (unhurried(each) for each in STAGES if each.name == name)

    def parts(context: Context) -> Iterator[Part]:
        yield from (each for each in found.parts(context) if each.name.split(",")[0] == part)

    return STAGES[0], replace(found, parts=parts)


def twice() -> tuple[Stage, ...]:
    """Scenarios of which the second run does what the first had no time for."""
    return (
        STAGES[0],
        stage("wrong", wrong),
        stage("late", late),
        stage("known", known),
        stage("too long", absent, least_s=0 if RESUMED else 10_000),
    )


def known(context: Context) -> Iterator[Part]:
    yield Part("asks", lambda: context.row("known", figure=context.kept["a figure"]))
    if not RESUMED:
        raise RuntimeError("the engine did not start")


class Played(running.Running):
    """What is to hang finds little time left when it begins; all else has more than a busy machine takes."""

    _begun = ""

    def _wait_s(self, part: str | None) -> float:
        if part != self._begun:
            self._begun = part or ""
            if part == "hangs" and self._stage.name == "hanging":
                self._deadline = time.monotonic() + 0.5
            elif part != "hangs":
                self._part_ends = inf
        return super()._wait_s(part)


RESUMED = "--resume" in sys.argv
SCENARIOS = {each.__name__: each for each in (many_ends, wrong_kernel, wrong_acceptance, spawned, twice)}

if __name__ == "__main__":
    running.GRACE_S = 1.0
    running.Running = Played  # type: ignore[misc]
    check = running.Check(Options(Path(sys.argv[2]), AMPLE_S, True, (), None, (), RESUMED))
    check.start = "spawn" if sys.argv[1] == "spawned" else "fork"
    check.run(SCENARIOS[sys.argv[1]]())
