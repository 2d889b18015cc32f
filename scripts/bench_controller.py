"""The throughput policy against every fixed number of guesses, with a drafter of known acceptance; and after a change.

    python scripts/bench_controller.py [--streams 1,4,16,32] [--rounds 5]

Runs the default model in this process. The drafter knows the answers, which are generated first, and is right with a
given probability at each place. All settings are interleaved in every round; prints medians and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

from slipstream.engine.checkpoint.checkpoint import locate
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.speculation.controller import Bandit, Fixed, Policy, Throughput
from slipstream.engine.testing import LocalEngine, OracleDrafter
from slipstream.loadtest.dataset import ShareGPT
from slipstream.server.text import load_tokenizer

MOST = 8
PROFILES = {
    "good": [0.9, 0.88, 0.86, 0.84, 0.82, 0.8, 0.78, 0.76],
    "middling": [0.6, 0.55, 0.5, 0.45, 0.4, 0.4, 0.4, 0.4],
    "poor": [0.15] * MOST,
}
TOKENS = 512
"""Per run, over all streams; at least 64 each."""


class Bench:
    def __init__(self, streams: int) -> None:
        self.oracle = OracleDrafter({}, 0.0)
        config = EngineConfig(kv_cache_memory="512MiB", max_draft_tokens=MOST)
        self.local = LocalEngine(config, [self.oracle])
        tokenizer = load_tokenizer(locate("default"))
        with ShareGPT() as data:
            questions = [c.question() for _, c in data.conversations() if c.question()]
        encoded = (tokenizer.encode(question) for question in questions)
        self.prompts = [ids[:100] for ids in encoded if len(ids) >= 20][:streams]
        self.tokens = max(TOKENS // streams, 64)
        self.params = SamplingParams(max_tokens=self.tokens, temperature=0.0)
        for prompt, done in zip(self.prompts, self.local.generate(self.prompts, self.params), strict=True):
            self.oracle.answers[tuple(prompt)] = done.tokens

    def use(self, policy: Policy) -> None:
        planner = self.local.engine.scheduler._guesses
        planner._policy, planner._pauses, planner._worth = policy, isinstance(policy, Throughput), 1.0

    def run(self) -> float:
        """Output tokens per second."""
        began = time.perf_counter()
        done = self.local.generate(self.prompts, self.params)
        seconds = time.perf_counter() - began
        for prompt, completion in zip(self.prompts, done, strict=True):
            assert completion.tokens == self.oracle.answers[tuple(prompt)]
        return len(self.prompts) * self.tokens / seconds


def against_fixed(bench: Bench, right: list[float], rounds: int) -> dict[str, float]:
    """Median tokens per second of each setting."""
    bench.oracle.right = right
    policies: dict[str, Policy] = {f"fixed {count}": Fixed(count) for count in (0, 1, 2, 3, 4, 6, 8)}
    policies |= {"throughput": Throughput(), "bandit": Bandit()}
    results: dict[str, list[float]] = {name: [] for name in policies}
    for turn in range(rounds + 1):  # the first one is for learning
        bench.oracle.salt = turn
        for name, policy in policies.items():
            bench.use(policy)
            rate = bench.run()
            if turn:
                results[name].append(rate)
    return {name: round(median(rates), 1) for name, rates in results.items()}


def after_change(bench: Bench, before: list[float], after: list[float]) -> list[float]:
    """Guesses verified per stream and step, in windows of 50 steps, from the change on."""
    bench.use(Throughput())
    bench.oracle.right = before
    for _ in range(3):
        bench.run()
    bench.oracle.right = after
    first = {stats.name: stats.draft_tokens for stats in bench.local.stats.drafters}["oracle"]
    steps = bench.local.stats.steps
    windows = []
    while len(windows) < 8:
        for prompt in bench.prompts:
            bench.local.submit(prompt, bench.params)
        while bench.local.engine.core.has_work:
            bench.local.step()
            stats = bench.local.stats
            if stats.steps - steps >= 50:
                drafted = stats.drafters[0].draft_tokens
                windows.append(round((drafted - first) / 50 / len(bench.prompts), 2))
                first, steps = drafted, stats.steps
    return windows[:8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,4,16,32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    report = []
    for streams in map(int, options.streams.split(",")):
        bench = Bench(streams)
        for name, right in PROFILES.items():
            rates = against_fixed(bench, right, options.rounds)
            fixed = {setting: rate for setting, rate in rates.items() if setting.startswith("fixed")}
            best = max(fixed, key=fixed.__getitem__)
            share = {policy: round(rates[policy] / fixed[best], 3) for policy in ("throughput", "bandit")}
            print(
                f"{streams:3} streams, {name:9} best {best} {fixed[best]:7.1f} tok/s, none {fixed['fixed 0']:7.1f}",
                share,
            )
            report.append({"streams": streams, "profile": name, "rates": rates, "best": best, **share})
        for before, after in (("good", "poor"), ("poor", "good")):
            windows = after_change(bench, PROFILES[before], PROFILES[after])
            print(f"{streams:3} streams, {before} -> {after}: guesses per stream in windows of 50 steps {windows}")
            report.append({"streams": streams, "change": [before, after], "windows": windows})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
