"""What a drafter costs or brings, good or bad, against speculation off: pairs of runs of the same requests, in turns.

    python scripts/bench_off.py [--drafters cold,warm,random,FOLDER] [--streams 1,8] [--temperatures 0,0.8]

One engine per drafter and one without, with the settings of the server, each in a process of its own; only one works
at a time. Processes differ by 5 %, by where their weights lie in memory, so they are started anew some times, in an
order that changes. Every round has new real prompts, the same for all engines, which take turns in an order that
changes, too. ``random`` is a head of random numbers, so a deliberately bad one; ``none`` is a second engine without
speculation, which says what to make of differences. Answers must be the same token for token, which is checked.
Prints the speed of each as a share of the speed without speculation: the median of the pairs, their quartiles and
their range; and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

from bench_tree import real_prompts

from slipstream.drafter.choice import make_drafters
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.testing.local import LocalEngine

OFF = "off"
TOKENS = {1: 96, 8: 64}
"""Per answer, by the number of streams; 48 with any other."""


Counts = tuple[int, int]
Cell = tuple[tuple[int, float], str]
"""Streams and temperature, and the engine."""


class Engine:
    """An engine in another process."""

    def __init__(self, drafter: str) -> None:
        self.counts: Counts = (0, 0)
        """Rows that verified proposals, and draft tokens accepted."""
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=serve, args=(drafter, there), daemon=True)
        self._process.start()
        there.close()
        self._here.recv()

    def timed(self, prompts: list[list[int]], params: SamplingParams) -> tuple[float, list[list[int]]]:
        """Seconds, and the answers."""
        self._here.send((prompts, params))
        seconds, answers, self.counts = self._here.recv()
        return seconds, answers

    def close(self) -> None:
        self._here.close()
        self._process.join()


def serve(drafter: str, other: Connection) -> None:
    off = drafter in (OFF, "none")
    config = EngineConfig(
        kv_cache_memory="256MiB", speculation="off" if off else "head", drafter=None if off else drafter
    )
    local = LocalEngine(config, [] if off else make_drafters(config))
    other.send("ready")
    while True:
        try:
            prompts, params = other.recv()
        except EOFError:
            return
        began = time.perf_counter()
        done = local.generate(prompts, params)
        seconds = time.perf_counter() - began
        drafters = local.stats.drafters
        counts = sum(each.drafts for each in drafters), sum(each.accepted_tokens for each in drafters)
        other.send((seconds, [completion.tokens for completion in done], counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafters", default="cold,warm,random")
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--temperatures", default="0,0.8")
    parser.add_argument("--processes", type=int, default=4, help="of each engine, one after the other")
    parser.add_argument("--rounds", type=int, default=5, help="with each process")
    parser.add_argument(
        "--warm-up", type=int, default=3, help="rounds that do not count: the policy learns the machine"
    )
    options = parser.parse_args()

    names = [OFF, *options.drafters.split(",")]
    cells = [(int(s), float(t)) for s in options.streams.split(",") for t in options.temperatures.split(",")]
    rounds = options.rounds + options.warm_up
    prompts = real_prompts("default", sum(streams for streams, _ in cells) * rounds * options.processes, 500)
    random = Random(0)
    seconds: dict[Cell, list[float]] = {(cell, name): [] for cell in cells for name in names}
    counts: dict[Cell, Counts] = dict.fromkeys(seconds, (0, 0))
    for _ in range(options.processes):
        engines = {name: Engine(name) for name in random.sample(names, len(names))}
        for cell in cells:
            streams, temperature = cell
            before = {name: engines[name].counts for name in names}
            for number in range(rounds):
                asked, prompts = prompts[:streams], prompts[streams:]
                params = SamplingParams(
                    max_tokens=TOKENS.get(streams, 48), min_tokens=16, temperature=temperature, seed=number
                )
                answers: list[list[list[int]]] = []
                for name in random.sample(names, len(names)):
                    taken, tokens = engines[name].timed(asked, params)
                    answers.append(tokens)
                    if number >= options.warm_up:
                        seconds[cell, name].append(taken)
                assert all(each == answers[0] for each in answers), "a draft token changed an answer"
            for name in names:
                drafts, accepted = (
                    so_far + now - then
                    for so_far, now, then in zip(counts[cell, name], engines[name].counts, before[name], strict=True)
                )
                counts[cell, name] = drafts, accepted
        for each in engines.values():
            each.close()
    results: list[dict[str, Any]] = []
    print(f"{platform.processor() or platform.machine()}: speed with a drafter / speed without")
    print("streams  temperature  drafter          median   quartiles        range           tokens/step")
    for cell in cells:
        streams, temperature = cell
        for name in names[1:]:
            pairs = zip(seconds[cell, OFF], seconds[cell, name], strict=True)
            ratios = [off / own for off, own in pairs]
            low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
            drafts, accepted = counts[cell, name]
            length = 1 + accepted / drafts if drafts else 1.0
            results.append(
                {
                    "streams": streams,
                    "temperature": temperature,
                    "drafter": name if name in ("cold", "warm", "random", "none") else Path(name).name,
                    "ratio": round(median(ratios), 4),
                    "quartiles": [round(low, 4), round(high, 4)],
                    "range": [round(min(ratios), 4), round(max(ratios), 4)],
                    "verified_steps": drafts,
                    "accept_length": round(length, 3),
                }
            )
            print(
                f"{streams:7d}  {temperature:11g}  {results[-1]['drafter']:15s}  {median(ratios):6.3f}   "
                f"{low:.3f} - {high:.3f}   {min(ratios):.3f} - {max(ratios):.3f}   {length:.2f} in {drafts} steps"
            )
    print(json.dumps({"processor": platform.processor(), "pairs": len(ratios), "results": results}))


if __name__ == "__main__":
    main()
