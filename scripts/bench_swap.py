"""What a swap of the learned drafter costs the steps around it, on the default model: a table in Markdown.

    python scripts/bench_swap.py --streams 32 --swaps 50

While a version is prepared in the background, which does a small piece of that per step, a coin decides for every step
whether there is one; those without are the measure of what steps take undisturbed, and how much they differ by chance.
The added delay of a step is its time less the median of the undisturbed steps around it, never itself. The version goes
live just before a step, whose time includes that.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Literal

from slipstream.drafter.choice import DRAFT_VOCAB_SIZE, make_drafters
from slipstream.drafter.head import layout
from slipstream.engine.checkpoint.checkpoint import locate, open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.config import decoder_config
from slipstream.engine.operations import SwapDrafter, SwapReport
from slipstream.engine.testing.local import LocalEngine
from slipstream.loadtest.dataset import ShareGPT
from slipstream.server.text import load_tokenizer

Kind = Literal["undisturbed", "preparing", "landing"]
BETWEEN = 15
"""Steps between two swaps."""
NEIGHBOURS = 10
WARM_UP = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--speculation", default="auto")
    parser.add_argument("--speculation-policy", default="throughput")
    options = parser.parse_args()

    config = EngineConfig(
        drafter="cold",
        speculation=options.speculation,
        speculation_policy=options.speculation_policy,
        max_running=options.streams,
        kv_cache_memory="1GiB",
    )
    local = LocalEngine(config, make_drafters(config))
    prompts = read_prompts(2 * options.streams)
    with tempfile.TemporaryDirectory() as folder:
        steps, pauses, prepared = run(local, prompts, options.streams, options.swaps, write_heads(Path(folder)))
    report(steps, pauses, prepared)


def read_prompts(count: int) -> list[list[int]]:
    tokenizer = load_tokenizer(locate("default"))
    found: list[list[int]] = []
    with ShareGPT() as dataset:
        for _, conversation in dataset.conversations():
            tokens = tokenizer.encode(conversation.question() or "", add_special_tokens=False)
            if 10 <= len(tokens) <= 200:
                found.append(tokens)
            if len(found) == count:
                break
    return found


def write_heads(folder: Path) -> list[Path]:
    """Two of the sizes of --drafter cold."""
    target = decoder_config(open_checkpoint("default").config)
    config = layout.config_for(target, DRAFT_VOCAB_SIZE)
    for seed in range(2):
        layout.write(folder / str(seed), config, layout.random_tensors(config, seed))
    return [folder / "0", folder / "1"]


def run(
    local: LocalEngine, prompts: list[list[int]], streams: int, swaps: int, heads: list[Path]
) -> tuple[list[tuple[Kind, float]], list[float], list[float]]:
    """Steps with nothing but streams in them, and seconds that each swap paused and took to be prepared."""
    steps: list[tuple[Kind, float]] = []
    replies: list[SwapReport] = []
    lengths = Random(0)
    coin = Random(1)
    swap, quiet, done = None, 0, 0
    while len(replies) < swaps:
        running = [completion for completion in local.completions.values() if completion.finish_reason is None]
        while len(running) < streams:
            params = SamplingParams(max_tokens=lengths.randint(500, 1500), temperature=0.8)
            running.append(local.submit(prompts[len(local.completions) % len(prompts)], params))
        steady = all(completion.deltas for completion in running)  # no prompt is in the step
        if steady and swap is None and quiet >= BETWEEN and done < swaps and len(steps) >= WARM_UP:
            done += 1
            swap = local.engine.operate(SwapDrafter(done + 1, "", str(heads[done % len(heads)])))
        rests = swap is not None and coin.random() < 0.5
        began = time.perf_counter()
        if rests:
            local.engine.core.step()
        else:
            local.step()
        seconds = time.perf_counter() - began
        kind: Kind = "undisturbed"
        if swap is not None and not rests:
            kind = "landing" if swap.done() else "preparing"
            if swap.done():
                replies.append(swap.result())
                swap, quiet = None, 0
        if steady:
            quiet += 1
            steps.append((kind, seconds))
    return steps[WARM_UP:], [reply.pause_seconds for reply in replies], [reply.prepare_seconds for reply in replies]


def added(steps: list[tuple[Kind, float]], kind: Kind) -> list[tuple[float, float]]:
    """Milliseconds of each step of this kind beyond the median of the undisturbed ones around it, and that median."""
    quiet = [i for i, step in enumerate(steps) if step[0] == "undisturbed"]
    found: list[tuple[float, float]] = []
    for place, (its_kind, seconds) in enumerate(steps):
        if its_kind == kind:
            near = sorted((i for i in quiet if i != place), key=lambda i: abs(i - place))[:NEIGHBOURS]
            usual = statistics.median(steps[i][1] for i in near)
            found.append(((seconds - usual) * 1e3, usual * 1e3))
    return found


def report(steps: list[tuple[Kind, float]], pauses: list[float], prepared: list[float]) -> None:
    kinds: tuple[Kind, ...] = ("undisturbed", "preparing", "landing")
    print("| steps | number | median ms | p90 ms | longest ms | added: median | p90 | longest | beyond 10 % and 5 ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in kinds:
        times = sorted(seconds * 1e3 for its_kind, seconds in steps if its_kind == kind)
        if not times:
            continue
        pairs = added(steps, kind)
        delays = sorted(delay for delay, _ in pairs)
        late = sum(delay > max(5.0, 0.1 * usual) for delay, usual in pairs) / len(pairs)
        ninth = int(len(times) * 0.9)
        cells = [
            statistics.median(times),
            times[ninth],
            times[-1],
            statistics.median(delays),
            delays[ninth],
            delays[-1],
        ]
        print(f"| {kind} | {len(times)} | {' | '.join(f'{cell:.1f}' for cell in cells)} | {late:.0%} |")
    if pauses:
        print(
            f"\nGoing live: {statistics.median(pauses) * 1e3:.3f} ms in the median, {max(pauses) * 1e3:.3f} ms at most;"
        )
        print(f"reading, checking and packing: {statistics.median(prepared) * 1e3:.0f} ms in the median.")


if __name__ == "__main__":
    main()
