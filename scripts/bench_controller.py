"""The throughput policy against fixed numbers of draft tokens, with a drafter of known acceptance; and after a change.

    python scripts/bench_controller.py [--streams 1,4,16,32] [--profiles good,middling,poor] [--rounds 7] [--bandit]

Runs the default model in this process. The drafter knows the answers, which are generated first, and is right with a
given probability at each place. All settings take turns in every round, in a new order each. The best fixed number of
a round is the one with the best median in all *other* rounds: the best of seven noisy figures would flatter itself.
Prints each policy's share of it, the median over rounds with quartiles, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import time
from random import Random
from statistics import median, quantiles

import numpy as np

from slipstream.engine.checkpoint.checkpoint import locate
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.plan import StepWork
from slipstream.engine.scheduling.controller import Bandit, Fixed, Policy, Throughput
from slipstream.engine.scheduling.draft_worth import PROBE_EVERY, Worth
from slipstream.engine.speculation.oracles import OracleDrafter
from slipstream.engine.testing.local import LocalEngine
from slipstream.loadtest.dataset import ShareGPT
from slipstream.server.text import load_tokenizer

MOST = 8
PROFILES = {
    "good": [0.9, 0.88, 0.86, 0.84, 0.82, 0.8, 0.78, 0.76],
    "middling": [0.6, 0.55, 0.5, 0.45, 0.4, 0.4, 0.4, 0.4],
    "poor": [0.15] * MOST,
}
COUNTS = (0, 1, 2, 3, 4, 6, 8)
TOKENS = 512
"""Per run, over all streams; at least 64 each."""


class Bench:
    def __init__(self, streams: int) -> None:
        self.oracle = OracleDrafter({}, 0.0)
        config = EngineConfig(kv_cache_memory="512MiB", max_draft_tokens=MOST)
        self.local = LocalEngine(config, [self.oracle])
        tokenizer = load_tokenizer(locate("default"))
        with ShareGPT() as data:
            questions = [conversation.question() for _, conversation in data.conversations()]
        encoded = (tokenizer.encode(question) for question in questions if question)
        self.prompts = [ids[:100] for ids in encoded if len(ids) >= 20][:streams]
        self.tokens = max(TOKENS // streams, 64)
        self.params = SamplingParams(max_tokens=self.tokens, temperature=0.0)
        for prompt, done in zip(self.prompts, self.local.generate(self.prompts, self.params), strict=True):
            self.oracle.answers[tuple(prompt)] = done.tokens

    def use(self, policy: Policy) -> None:
        planner = self.local.engine.scheduler.draft_planner
        planner._policy, planner._pauses = policy, isinstance(policy, Throughput)
        planner._cheap = Worth(PROBE_EVERY)

    def run(self) -> float:
        """Output tokens per second."""
        began = time.perf_counter()
        done = self.local.generate(self.prompts, self.params)
        seconds = time.perf_counter() - began
        for prompt, completion in zip(self.prompts, done, strict=True):
            assert completion.tokens == self.oracle.answers[tuple(prompt)]
        return len(self.prompts) * self.tokens / seconds


def against_fixed(bench: Bench, right: list[float], rounds: int, learning: dict[str, Policy]) -> dict[str, list[float]]:
    """Tokens per second of each setting, by round."""
    bench.oracle.right = right
    policies: dict[str, Policy] = {f"fixed {count}": Fixed(count) for count in COUNTS} | learning
    results: dict[str, list[float]] = {name: [] for name in policies}
    random, order = Random(0), list(policies)
    for turn in range(rounds + 1):  # the first one is for learning
        bench.oracle.salt = turn
        random.shuffle(order)
        for name in order:
            bench.use(policies[name])
            rate = bench.run()
            if turn:
                results[name].append(rate)
    return results


def shares(rates: dict[str, list[float]], policy: str) -> list[float]:
    """By round, what a policy reaches of the fixed number that was the best in the other rounds."""
    fixed = {name: each for name, each in rates.items() if name.startswith("fixed")}
    found = []
    for turn, rate in enumerate(rates[policy]):
        others = {name: median(each[:turn] + each[turn + 1 :]) for name, each in fixed.items()}
        found.append(rate / fixed[max(others, key=others.__getitem__)][turn])
    return found


def after_change(bench: Bench, before: list[float], after: list[float]) -> list[tuple[float, float]]:
    """By window of 50 steps from the change on: draft tokens verified per stream and step, and what they are worth.

    The worth is the throughput expected of that number of draft tokens, by the true probabilities and the engine's
    costs of steps, relative to the best fixed number.
    """
    bench.use(Throughput())
    bench.oracle.right = before
    for _ in range(3):
        bench.run()
    bench.oracle.right = after
    streams = len(bench.prompts)

    def drafted() -> int:
        return bench.local.stats.drafters[0].draft_tokens

    windows: list[tuple[float, float]] = []
    first, steps = drafted(), 0
    while len(windows) < 8:
        for prompt in bench.prompts:
            bench.local.submit(prompt, bench.params)
        while bench.local.engine.core.has_work and len(windows) < 8:
            bench.local.step()
            steps += 1
            if steps % 50 == 0:
                drafts = (drafted() - first) / 50 / streams
                first = drafted()
                best = max(expected_rate(bench, after, count) for count in COUNTS)
                windows.append((round(drafts, 2), round(expected_rate(bench, after, drafts) / best, 3)))
    bench.local.finish()
    return windows


def expected_rate(bench: Bench, right: list[float], drafts: float) -> float:
    """Tokens per second of a stream that verifies so many draft tokens per step, in the middle of an answer."""
    tokens = 1 + np.interp(drafts, range(MOST + 1), np.concatenate(([0.0], np.cumprod(right).cumsum())))
    streams, context = len(bench.prompts), 100 + bench.tokens // 2
    size = round(streams * (1 + drafts))
    seconds = bench.local.engine.scheduler.cost.predict(StepWork(size, context * streams + size, context * size))
    return float(tokens / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,4,16,32")
    parser.add_argument("--profiles", default=",".join(PROFILES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bandit", action="store_true", help="the bandit, too")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: at least 2, as the best number of one is that of the others")
    report = []
    print("| streams | drafter | none tok/s | best fixed: tok/s | policy | of the best | quartiles |")
    print("|---|---|---|---|---|---|---|")
    for streams in map(int, options.streams.split(",")):
        bench = Bench(streams)
        for name in options.profiles.split(","):
            learning: dict[str, Policy] = {"throughput": Throughput()}
            if options.bandit:
                learning["bandit"] = Bandit()
            rates = against_fixed(bench, PROFILES[name], options.rounds, learning)
            medians = {setting: median(each) for setting, each in rates.items()}
            best = max((f"fixed {count}" for count in COUNTS), key=medians.__getitem__)
            for policy in learning:
                found = shares(rates, policy)
                low, middle, high = quantiles(found, n=4)
                print(
                    f"| {streams} | {name} | {medians['fixed 0']:.0f} | {best.removeprefix('fixed ')}: "
                    f"{medians[best]:.0f} | {policy} | **{middle:.3f}** | {low:.3f} – {high:.3f} |",
                    flush=True,
                )
            report.append({"streams": streams, "profile": name, "rates": rates})
        for before, after in (("good", "poor"), ("poor", "good")):
            windows = after_change(bench, PROFILES[before], PROFILES[after])
            print(f"{streams:3} streams, {before} -> {after}, drafts and their worth in windows of 50 steps: {windows}")
            report.append({"streams": streams, "change": [before, after], "windows": windows})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
