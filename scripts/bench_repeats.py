"""Whether the gate's prediction holds where traffic repeats itself: the same questions again and again among new ones.

    python scripts/bench_repeats.py --folder /tmp/repeats --questions 40 --share 0.5 --minutes 6
    python scripts/bench_repeats.py --folder /tmp/eight --questions 8 --share 1 --answers 350 --minutes 4

A server answers real questions into a traffic store; a head is trained on it and judged, and then drafts for requests
of the same kind on a server. Prints what the gate had said beside what came.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path
from random import Random

from slipstream.loadtest.children import free_port, running
from slipstream.loadtest.demo.heldout import Answers, HeldOut
from slipstream.loadtest.demo.replay import keep_answers
from slipstream.loadtest.harness import connect
from slipstream.loadtest.workloads import Request, Workload, WorkloadOptions

SLIPSTREAM = [sys.executable, "-P", "-m", "slipstream.server"]
STREAMS, OUTPUT_TOKENS = 16, 96


class Repeating(Workload):
    """A share of the requests asks one of a few questions, in any order; the others ask new ones."""

    def __init__(self, questions: list[Request], share: float, fresh: Workload, seed: int) -> None:
        super().__init__(fresh.options)
        self._repeated, self._share, self._fresh, self._random = questions, share, fresh, Random(seed)

    async def round(self, count: int) -> list[Request]:
        found = []
        for _ in range(count):
            repeat = self._random.random() < self._share
            found += [self._random.choice(self._repeated)] if repeat else await self._fresh.round(1)
        return found


def run(*arguments: str) -> str:
    done = subprocess.run([*SLIPSTREAM, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}{done.stdout}")
    return done.stdout


async def live(requests: list[Request], registry: Path) -> Answers:
    """The answers to these requests, one after the other, with chains of three."""
    port = free_port()
    command = [*SLIPSTREAM, "serve", "--port", str(port), "--registry", str(registry), "--speculation", "head"]
    # Adaptive speculation would verify as much as pays on this machine, and the gate judges whole chains.
    command += ["--speculation-policy", "fixed", "--max-draft-tokens", "3"]
    log = registry.parent / "live.log"
    async with running("server", command, port, log=log), connect(f"http://127.0.0.1:{port}", timeout=600) as target:
        heldout = HeldOut(requests)
        found = await heldout.measure(target, "head")
        assert not heldout.failed
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps everything")
    parser.add_argument("--questions", type=int, default=40, help="that are asked again and again")
    parser.add_argument("--share", type=float, default=0.5, help="of the requests that ask one of them")
    parser.add_argument("--answers", type=int, default=600, help="to learn from")
    parser.add_argument("--live", type=int, default=400, help="requests to compare with")
    parser.add_argument("--minutes", type=float, default=6, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="which questions, and in which order")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    traffic, registry = folder / "traffic", folder / "registry"

    fresh = Workload(WorkloadOptions(output_tokens=OUTPUT_TOKENS, seed=options.seed))
    questions = asyncio.run(fresh.round(options.questions))
    workload = Repeating(questions, options.share, fresh, options.seed)
    replay = asyncio.run(keep_answers(workload, traffic, options.answers, STREAMS))
    print(f"{replay.sent} answers, {replay.tokens:,} tokens, {replay.failed} failed", flush=True)
    trained = run(
        *("drafter", "train", "--registry", str(registry), "--traffic-folder", str(traffic), "--json"),
        *("--minutes", str(options.minutes), "--round-tokens", "40000", "--promote"),
    )
    versions = json.loads(trained)["versions"]
    if not versions:
        raise SystemExit(f"nothing passed the gate: {trained}")
    version = versions[-1]
    gate = version["manifest"]["gate"]
    predicted = gate["accept_length"]
    print(
        f"gate: {predicted:.3f} tokens per step on {gate['texts']:.0f} texts, {gate['different_texts']:.0f} of them "
        f"different, {gate['repeated']:.0%} asked before"
    )
    requests = asyncio.run(workload.round(options.live))
    is_old = [request in questions for request in requests]
    found = asyncio.run(live(requests, registry))
    old, new = (
        Answers([answer for answer, each in zip(found.answers, is_old, strict=True) if each == wanted])
        for wanted in (True, False)
    )
    random = Random(0)
    means = sorted(Answers(random.choices(found.answers, k=len(requests))).accept_length for _ in range(2000))
    print(
        f"live: {found.accept_length:.3f} tokens per step in {len(requests)} requests (95 % of a bootstrap: "
        f"{means[50]:.3f} to {means[-51]:.3f}), {old.accept_length:.3f} in the {len(old.answers)} repeated ones and "
        f"{new.accept_length:.3f} in the others; prediction {predicted / found.accept_length - 1:+.1%}"
    )


if __name__ == "__main__":
    main()
