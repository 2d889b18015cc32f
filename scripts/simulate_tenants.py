"""Quiet tenants beside one that floods, without a machine: ``python -P scripts/simulate_tenants.py [--seconds 100]``.

The real scheduler plans the steps, and each takes as long as a table says, so figures depend on scheduling only. The
requests are those of ``slipstream bench tenants``: real questions, answers of 16 to 64 tokens, a tenth of them cut off.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from random import Random

import numpy as np

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import NewRequest, SamplingParams
from slipstream.engine.plan import StepResult, StepWork
from slipstream.engine.scheduling.scheduler import Scheduler
from slipstream.engine.scheduling.step_cost import StepCost
from slipstream.loadtest.dataset import estimate_tokens
from slipstream.loadtest.workloads import Workload, WorkloadOptions

# Seconds by tokens, about what 2 cores with AVX-512 and BF16 take for the default model; what attention adds.
TABLE = {
    1: 0.0072,
    4: 0.0088,
    8: 0.0115,
    16: 0.0145,
    32: 0.02,
    64: 0.032,
    128: 0.052,
    256: 0.095,
    512: 0.175,
    1024: 0.35,
}
READS, PAIRS = 0.019, 0.21
HOST_S = 0.0006
TEMPLATE_TOKENS = 30
STREAMS, MOST_OPEN, OVERLOAD, QUIET_SHARE = 64, 256, 1.5, 0.05
Arrival = tuple[float, str, int, int]
"""When, whose, tokens of the prompt and of the answer."""


def step_cost() -> StepCost:
    cost = StepCost()
    probes = [(StepWork(1, 20_000, 0), TABLE[1] + READS), (StepWork(512, 0, 500_000), TABLE[512] + PAIRS / 10)]
    cost.calibrate([(StepWork(tokens), seconds) for tokens, seconds in TABLE.items()], probes)
    return cost


class Simulation:
    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self._truth, self._random = step_cost(), Random(seed)
        config = EngineConfig()
        self._scheduler = Scheduler(config, 4 * 4096, 4096, step_cost(), lambda: self.now)
        self.requests: list[Arrival] = []
        self.first: dict[int, float] = {}
        self.tokens: list[float] = []
        """When each came."""
        self.open = 0

    def add(self, arrival: Arrival) -> None:
        number, (due, flow, prompt, answer) = len(self.requests), arrival
        self.requests.append(arrival)
        self.open += 1
        tokens = [number // 1000, number % 1000, *[7] * (prompt - 2)]
        params = SamplingParams(max_tokens=answer)
        self._scheduler.add(NewRequest(request_id=number, prompt=tokens, params=params, arrival=due, flow=flow))

    def step(self) -> int | None:
        """How many requests ended; None if there is nothing to do."""
        plan = self._scheduler.schedule()
        if plan is None:
            return None
        seconds = self._truth.predict(plan.work) * self._random.uniform(0.95, 1.1) + HOST_S
        self.now += seconds
        rows = len(plan.slots)
        tokens = [[1] * sample for sample in plan.samples]
        result = StepResult(tokens, [0] * rows, [()] * rows, {}, {}, {}, seconds=seconds)
        ended = 0
        for delta in self._scheduler.commit(plan, result):
            self.tokens += [self.now] * len(delta.tokens)
            if delta.tokens:
                self.first.setdefault(delta.request_id, self.now)
            ended += delta.finish_reason is not None
        self.open -= ended
        return ended

    def pace(self, start: float, end: float) -> float:
        return sum(start < each <= end for each in self.tokens) / (end - start)

    def p99(self, flow: str) -> float:
        waits = [at - self.requests[each][0] for each, at in self.first.items() if self.requests[each][1] == flow]
        return float(np.percentile(waits, 99))


def peak(seconds: float, seed: int, draw: Callable[[Random], tuple[int, int]]) -> tuple[float, float]:
    """Tokens and requests per second of a server that always has enough to do."""
    simulation, random = Simulation(seed), Random(f"peak {seed}")
    due = STREAMS
    while simulation.now < seconds:
        for _ in range(due):
            simulation.add((simulation.now, "flood", *draw(random)))
        due = simulation.step() or 0
    return simulation.pace(0.2 * seconds, seconds), len(simulation.first) / simulation.now


def phase(rates: dict[str, float], seconds: float, seed: int, draw: Callable[[Random], tuple[int, int]]) -> Simulation:
    arrivals: list[Arrival] = []
    for flow, rate in rates.items():
        random, at = Random(f"{flow} {seed}"), 0.0
        while (at := at + random.expovariate(rate)) < seconds:
            arrivals.append((at, flow, *draw(random)))
    arrivals.sort(reverse=True)
    simulation = Simulation(seed)
    while simulation.now < seconds:
        while arrivals and arrivals[-1][0] <= simulation.now:
            if arrivals[-1][1] == "flood" and simulation.open >= MOST_OPEN:
                arrivals.pop()  # refused
            else:
                simulation.add(arrivals.pop())
        if simulation.step() is None:
            if not arrivals:
                break
            simulation.now = arrivals[-1][0]
    return simulation


async def lengths(count: int = 2000) -> Sequence[int]:
    requests = await Workload(WorkloadOptions(seed=1)).round(count)
    return [estimate_tokens(each.body["messages"][0]["content"]) + TEMPLATE_TOKENS for each in requests]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    prompts = asyncio.run(lengths())

    def draw(random: Random) -> tuple[int, int]:
        answer = random.randint(16, 64)
        return random.choice(prompts), random.randint(1, answer) if random.random() < 0.1 else answer

    for seed in range(asked.seeds):
        tokens, requests = peak(asked.seconds, seed, draw)
        quiet = dict.fromkeys(("quiet 1", "quiet 2"), QUIET_SHARE * requests)
        alone = phase(quiet, asked.seconds, seed, draw)
        flood = (OVERLOAD - 2 * QUIET_SHARE) * requests
        together = phase({"flood": flood} | quiet, asked.seconds, seed, draw)
        ratios = ", ".join(f"{together.p99(name) / alone.p99(name):.2f}" for name in quiet)
        goodput = together.pace(0.0, asked.seconds) / tokens
        print(f"seed {seed}: quiet tenants' p99 of the first token {ratios} times theirs alone, goodput {goodput:.2f}")


if __name__ == "__main__":
    main()
