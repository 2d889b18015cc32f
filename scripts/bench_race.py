"""What a race with the target's noise brings for sampled answers: how often drafts are right, and what drawing costs.

    python scripts/bench_race.py [--drafter warm] [--temperatures 0.6,0.8,1.0] [--prompts 24] [--tokens 96]

Runs real questions through the default model in this process. First guesses: at every position of sampled answers, is
the token that came the head's most likely one, or the first of its race; is it among its two or four most likely ones,
or among the first two or four of the race. Accept length: tokens per verification step of chains of 3 and trees of 8,
with the most likely tokens as before and with the race; both give the same answers, which is checked. Cost:
microseconds per row of drawing by a race, and by inverting the cumulative distribution as torch does it, for rows that
the model has made.

Counts do not mind what else runs on the machine; the cost does. Prints tables in Markdown, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from slipstream.drafter.autoregressive import AutoregressiveDrafter
from slipstream.drafter.choice import make_drafters
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.runner.speculator import Speculator
from slipstream.engine.speculation.protocol import DraftRow
from slipstream.engine.testing.local import LocalEngine
from slipstream.kernels import ops
from slipstream.kernels.native.library import isa

GUESSES = (1, 2, 4)
MOST = max(GUESSES)
BUDGETS = {"chain of 3": (3, 1), "tree of 8": (8, 3)}
"""Draft tokens verified per step, and the width."""
ROWS, REPEATS = 64, 30

Guesses = dict[str, list[int]]
"""Tokens, best first, by how they were chosen."""


def new_engine(options: argparse.Namespace, budget: int, width: int, stop_below: float) -> LocalEngine:
    config = EngineConfig(
        model=options.model,
        dtype=options.dtype,
        speculation="head",
        drafter=options.drafter,
        speculation_policy="fixed",
        max_draft_tokens=budget,
        draft_width=width,
        max_running=options.streams,
        kv_cache_memory="512MiB",
    )
    drafters = make_drafters(config)
    for drafter in drafters:
        assert isinstance(drafter, AutoregressiveDrafter)
        drafter._stop_below = stop_below
    return LocalEngine(config, drafters)


def run(local: LocalEngine, prompts: Sequence[list[int]], tokens: int, temperature: float) -> list[list[int]]:
    """The answers; every prompt has a seed of its own."""
    done = [
        local.submit(prompt, SamplingParams(max_tokens=tokens, temperature=temperature, seed=1000 + i))
        for i, prompt in enumerate(prompts)
    ]
    local.finish()
    return [completion.tokens for completion in done]


@contextmanager
def watched(found: dict[tuple[int, int], Guesses]) -> Iterator[None]:
    """Keeps what the head would guess, by seed and index of the token; nothing is verified, so all are seen."""
    race = AutoregressiveDrafter._race

    def both(
        self: AutoregressiveDrafter, scores: Tensor, rows: Sequence[DraftRow], depth: int
    ) -> tuple[Tensor, Tensor]:
        likely = scores.topk(MOST).indices
        chosen = race(self, scores, rows, depth)
        for name, columns in (("most likely", likely), ("race", chosen[1])):
            tokens = columns if self._vocabulary is None else self._vocabulary[columns]
            for row, best in zip(rows, tokens.tolist(), strict=True):
                found.setdefault((row.seed, row.index + depth), {})[name] = best
        return chosen

    with patch.object(AutoregressiveDrafter, "_race", both), patch.object(Speculator, "draft_tree", lambda *_: None):
        yield


def first_guesses(options: argparse.Namespace, prompts: list[list[int]], temperature: float) -> dict[str, Any]:
    found: dict[tuple[int, int], Guesses] = {}
    local = new_engine(options, MOST, MOST, stop_below=2.0)
    with watched(found):
        answers = run(local, prompts, options.tokens, temperature)
    local.close()
    result: dict[str, Any] = {"temperature": temperature}
    judged = [
        (guesses, answer[index])
        for i, answer in enumerate(answers)
        for index in range(len(answer))
        if (guesses := found.get((1000 + i, index))) is not None
    ]
    result["positions"] = len(judged)
    for count in GUESSES:
        for name in ("most likely", "race"):
            right = sum(token in guesses[name][:count] for guesses, token in judged)
            result[f"{name} {count}"] = round(right / len(judged), 4)
    return result


@contextmanager
def as_before() -> Iterator[None]:
    """Sampled answers are drafted for with the most likely tokens; not in the compiled call, which races."""

    def most_likely(self: AutoregressiveDrafter, scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return self._most_likely(scores)

    drafter = AutoregressiveDrafter
    with patch.object(drafter, "_race", most_likely), patch.object(drafter, "_draft_at_once", lambda *_: False):
        yield


def accept_lengths(options: argparse.Namespace, prompts: list[list[int]], temperature: float) -> list[dict[str, Any]]:
    results = []
    for name, (budget, width) in BUDGETS.items():
        row: dict[str, Any] = {"draft": name}
        expected: list[list[int]] | None = None
        for how in ("most likely", "race"):
            local = new_engine(options, budget, width, stop_below=0.0)
            with as_before() if how == "most likely" else nullcontext():
                answers = run(local, prompts, options.tokens, temperature)
            [stats] = local.stats.drafters
            local.close()
            row[how] = round(1 + stats.accepted_tokens / stats.drafts, 3)
            row[f"{how}: verified"] = round(stats.draft_tokens / stats.drafts, 2)
            assert expected is None or answers == expected, "the answers depend on the drafter"
            expected = answers
        row["ratio"] = round(row["race"] / row["most likely"], 3)
        results.append(row)
    return results


def rows_of_the_model(options: argparse.Namespace, prompts: list[list[int]], temperature: float) -> Tensor:
    """Weights that the target's tokens were drawn from, [ROWS, vocab]."""
    kept: list[Tensor] = []
    draw = ops.draw

    def watch(weights: Tensor, seeds: Tensor, indices: Tensor) -> Tensor:
        if len(kept) < 2 * ROWS:
            kept.extend(weights.clone())
        return draw(weights, seeds, indices)

    local = new_engine(options, 1, 1, stop_below=2.0)
    with patch.object(ops, "draw", watch):
        run(local, prompts[: options.streams], 2 * ROWS // options.streams + 1, temperature)
    local.close()
    return torch.stack(kept[-ROWS:])


def microseconds(work: Any, rows: int) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e6 * median(times) / rows


def costs(weights: Tensor) -> dict[str, float]:
    """Per row, all rows in one call and one row a call."""
    seeds, indices = torch.arange(len(weights)) + 5, torch.arange(len(weights))
    shares = torch.rand(len(weights), 1, dtype=torch.float64)
    vocab = weights.shape[1]
    ids = torch.arange(0, vocab, 2, dtype=torch.int32)
    half = weights[:, ::2].contiguous()

    def inverse(rows: Tensor, shares: Tensor) -> Tensor:
        cumulative = rows.double().cumsum(-1)
        return torch.searchsorted(cumulative, shares * cumulative[:, -1:], right=True)

    one = weights[:1].contiguous()
    logits = weights.clamp(min=1e-30).log()
    numbers = torch.ones(len(weights))
    parameters = numbers, torch.zeros(len(weights), dtype=torch.int32), 0 * numbers, numbers
    return {
        "race": microseconds(lambda: ops.draw(weights, seeds, indices), len(weights)),
        "race, one row a call": microseconds(lambda: ops.draw(one, seeds[:1], indices[:1]), 1),
        "first four of a race of half the vocabulary": microseconds(
            lambda: ops.race(half, seeds, indices, 4, ids), len(weights)
        ),
        "inverse of the cumulative distribution, in torch": microseconds(
            lambda: inverse(weights, shares), len(weights)
        ),
        "the weights (temperature alone)": microseconds(
            lambda: ops.distribution(logits.clone(), *parameters), len(weights)
        ),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows)])


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--drafter", default="warm", help="folder of a head, or 'warm'")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--temperatures", default="0.6,0.8,1.0")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--skip", type=int, default=12000, help="leave out so many prompts, those trained on")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--streams", type=int, default=8)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from bench_tree import real_prompts

    prompts = real_prompts(options.model, options.prompts, options.skip)
    with torch.inference_mode():
        guesses = [first_guesses(options, prompts, float(each)) for each in options.temperatures.split(",")]
        print(table(guesses), end="\n\n", flush=True)
        lengths = accept_lengths(options, prompts, 1.0)
        print(table(lengths), end="\n\n", flush=True)
        cost = costs(rows_of_the_model(options, prompts, 1.0))
    print(f"{processor()}, kernels for {isa()}, {torch.get_num_threads()} threads")
    print(table([{"microseconds per row": name, "": f"{value:.1f}"} for name, value in cost.items()]))
    print(json.dumps({"first guesses": guesses, "accept length": lengths, "microseconds": cost}))


if __name__ == "__main__":
    main()
