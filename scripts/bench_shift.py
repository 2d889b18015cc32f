"""What a drafter knows after its traffic has changed: chat first, then code, against a drafter that only ever saw code.

    python scripts/bench_shift.py --folder /tmp/shift --minutes 12

A server answers real prompts of both kinds into traffic stores. One registry is trained on chat, then as long on a
store that holds chat and, later, code; another for the same time on code alone, beside it and with as many threads.
Versions are scored on held-out answers, as the gate does. Answers that are in the folder already are not asked again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

from slipstream.loadtest.demo.replay import keep_answers
from slipstream.loadtest.workloads import Workload, WorkloadName, WorkloadOptions

SLIPSTREAM = [sys.executable, "-P", "-m", "slipstream.server"]
STREAMS, OUTPUT_TOKENS = 32, 128


async def answer(name: WorkloadName, folder: Path, skip: int, count: int) -> None:
    """Keeps so many answers of a workload, after the first ``skip`` prompts, in a traffic store."""
    described = WorkloadOptions(name=name, output_tokens=OUTPUT_TOKENS)
    workload = Workload(described)
    await workload.round(skip)
    replay = await keep_answers(workload, folder, count, STREAMS)
    print(f"{name}: {replay.sent} answers, {replay.tokens:,} tokens, {replay.failed} failed", flush=True)


def train(registry: Path, traffic: Path, minutes: float, threads: int) -> subprocess.Popen[str]:
    command = [*SLIPSTREAM, "drafter", "train", "--registry", str(registry), "--traffic-folder", str(traffic), "--json"]
    command += ["--minutes", str(minutes), "--threads", str(threads), "--round-tokens", "60000"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def learned(training: subprocess.Popen[str]) -> tuple[int, int]:
    """The newest version and the positions it was trained on."""
    out, _ = training.communicate()
    if training.returncode:
        raise SystemExit(f"training failed: {out}")
    found = json.loads(out)
    return found["versions"][-1]["version"], found["tokens"]


def score(registry: Path, version: int, heldout: Path) -> float:
    command = [*SLIPSTREAM, "drafter", "eval", str(version), "--registry", str(registry), "--all", "--json"]
    out = subprocess.run([*command, "--traffic-folder", str(heldout)], capture_output=True, text=True, check=True)
    length: float = json.loads(out.stdout)["verdict"]["accept_length"]
    return length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps everything")
    parser.add_argument("--minutes", type=float, default=12, help="of each training, with one thread")
    parser.add_argument("--answers", type=int, default=500, help="of each kind to learn from")
    parser.add_argument("--heldout", type=int, default=60, help="of each kind to score on")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    evolved, control = folder / "evolved", folder / "only-code"

    kinds: tuple[WorkloadName, ...] = ("sharegpt", "code")
    for name in kinds:
        if not (folder / f"heldout-{name}").exists():
            asyncio.run(answer(name, folder / f"heldout-{name}", 0, options.heldout))
        if not (folder / name).exists():
            asyncio.run(answer(name, folder / name, options.heldout, options.answers))
    # As a server's own store would be: chat was kept first, then code came.
    both = folder / "both"
    if not both.exists():
        shutil.copytree(folder / "sharegpt", both)
        asyncio.run(answer("code", both, options.heldout, options.answers))

    chat_version, positions = learned(train(evolved, folder / "sharegpt", options.minutes / 2, 2))
    print(f"trained on chat: version {chat_version}, {positions:,} positions", flush=True)
    shifted = train(evolved, both, options.minutes, 1)
    alone = train(control, folder / "code", options.minutes, 1)
    (shifted_version, positions), (code_version, code_positions) = learned(shifted), learned(alone)
    print(f"then on chat and code: version {shifted_version}, {positions:,} positions", flush=True)
    print(f"on code alone: version {code_version}, {code_positions:,} positions\n", flush=True)

    rows = {
        "trained on chat": (evolved, chat_version),
        "then as long while code came": (evolved, shifted_version),
        "as long on code alone": (control, code_version),
    }
    scores = {
        what: [score(registry, version, folder / f"heldout-{name}") for name in kinds]
        for what, (registry, version) in rows.items()
    }
    print("| accept length, chains of 3, held-out answers | chat | code |\n|---|---|---|")
    for what, (chat, code) in scores.items():
        print(f"| {what} | {chat:.3f} | {code:.3f} |")
    before, after, only = scores.values()
    print(f"\ncode: {after[1] / only[1]:.3f} of training on code alone; chat: {after[0] / before[0]:.3f} of before")


if __name__ == "__main__":
    main()
