"""Compiles every launch of Triton's kernels for GPUs that are not here: registers, spills and shared memory of each.

    python scripts/kernel_resources.py [--target sm_90 …] [--important] [--all-formats] [--only TEXT …] [--json FILE]
        [--markdown FILE]

Kernels are called as a step calls them, with tensors of an 8B model's sizes, in steps of several sizes; a driver
that has no device compiles each launch and runs nothing. The exit status is 1 where a kernel spills registers on sm_90
or sm_100, needs more shared memory than its GPU has, or does not compile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/kernels/triton"))
os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported

import torch  # noqa: E402
from fake_driver import TARGETS, Compiled, Target, compile_for  # noqa: E402

from slipstream.kernels.triton import launch  # noqa: E402

TOKENS = (1, 8, 64, 256, 2048)
"""Steps that differ in how kernels are tiled, or in what they are specialised for."""
CONTEXT = 1024
"""Tokens of sequences: more than are attended to in one go, so that what is compiled for longer ones is, too."""
MOST_STREAMS = 256
IMPORTANT = {
    "linear of a single row": (1,),
    **dict.fromkeys(
        ("attention decode", "attention, tiles of prompts", "rotate and store", "add and rms_norm"), (256,)
    ),
    **dict.fromkeys(("distribution", "log-probabilities", "experts"), (256,)),
    **dict.fromkeys(("linear", "low-rank products"), (8, 256)),
}
"""Kernels that keep much in registers, by how the names of their cases begin, and the tokens they are tried with."""
PACKAGE = "slipstream.kernels.triton"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default all")
    parser.add_argument(
        "--important",
        action="store_true",
        help="the largest kernels alone, for few sizes",
    )
    parser.add_argument("--all-formats", action="store_true", help="not only the number format that matters most")
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases whose names contain this; default all")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    rows = [row for name in names for row in compile_all(TARGETS[name], options)]
    found = table(rows)
    print(found)
    if options.json:
        options.json.write_text(json.dumps(rows))
    if options.markdown:
        options.markdown.write_text(page(found))
    sys.exit(1 if any(row["problem"] for row in rows) else 0)


def compile_all(target: Target, options: argparse.Namespace) -> list[Row]:
    """In a process of its own, since nothing that was decided for one target may be left for the next one."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: theirs.send(rows_for(target, options)))
    process.start()
    theirs.close()
    try:
        rows: list[Row] = ours.recv()
    except EOFError:
        process.join()
        sys.exit(f"the process that compiles for {target.name} ended with {process.exitcode}")
    process.join()
    return rows


def rows_for(target: Target, options: argparse.Namespace) -> list[Row]:
    compile_for(target)
    # Before kernels are imported: tensors on the CPU stand for those on the target.
    vars(launch).update(runs_on=lambda device_type: True, capability=lambda device: target.capability)
    from slipstream.kernels.cases import LLAMA_8B, Source, triton_cases

    compiled = Compiled(target, PACKAGE)
    rows: list[Row] = []
    for case in triton_cases(torch.device("cpu")):
        if options.only and not any(text in case.name for text in options.only):
            continue
        for dtype in case.dtypes if options.all_formats else case.dtypes[:1]:
            for tokens in important_tokens(case.name) if options.important else TOKENS:
                sizes = replace(LLAMA_8B.of_step(tokens), context=CONTEXT, streams=min(tokens, MOST_STREAMS))
                error = ""
                try:
                    case.prepare(Source(torch.device("cpu"), dtype, empty=True), sizes).run()
                except Exception:
                    error = traceback.format_exc()
                where = {"target": target.name, "case": case.name, "dtype": str(dtype)[6:], "tokens": tokens}
                rows += [where | asdict(each) | {"problem": problem(each, target)} for each in compiled.new()]
                if error:
                    print(error, file=sys.stderr)
                    rows.append(where | {"kernel": "", "problem": f"does not run: {error.strip().splitlines()[-1]}"})
    return rows


def important_tokens(case: str) -> tuple[int, ...]:
    return next((tokens for name, tokens in IMPORTANT.items() if case.startswith(name)), ())


def problem(found: Any, target: Target) -> str:
    if found.spills and target.spills_are_errors:
        return f"spills {found.spills} bytes"
    return f"{found.shared} bytes of shared memory, of {target.shared}" if found.shared > target.shared else ""


def table(rows: list[Row]) -> str:
    """Of kernels that were compiled for several sizes, every configuration once."""
    lines = [
        "| target | kernel | first called in | dtype | tokens | registers | spills | shared, KB | warps | stages | |"
    ]
    lines.append("|---" * 11 + "|")
    for row in rows:
        shared = f"{row['shared'] / 1024:.1f}" if "shared" in row else ""
        values = [row.get(name, "") for name in ("kernel", "case", "dtype", "tokens", "registers", "spills")]
        cells = [row["target"], *values, shared, row.get("warps", ""), row.get("stages", ""), row["problem"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def page(found: str) -> str:
    import triton

    return (
        "# What kernels take of a GPU\n\n"
        f"Written by `python scripts/kernel_resources.py --markdown docs/results/gpu/kernels.md` with Triton "
        f"{triton.__version__}, without a GPU: compiled for each, run on none. Registers are per thread; spills are in "
        "bytes (on gfx942 in registers); a kernel that is compiled alike for several sizes is listed at the first.\n\n"
        f"{found}\n"
    )


if __name__ == "__main__":
    main()
