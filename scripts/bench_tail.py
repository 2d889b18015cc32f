"""A batch of rollouts with a long tail, of a policy that has been trained: three epochs against no speculation.

    python scripts/bench_tail.py --model FOLDER --folder OUT [--updates 80] [--batches 8] [--seed 0]

Runs in an environment with reasoning-gym and this project; FOLDER is the default model as a Hugging Face folder
(scripts/gguf_to_hf.py). ``slipstream bench rollout`` on the default model samples a policy that is sure of nothing; a
policy in training is sure of most tokens, and this is the same measurement for one. The task is reasoning-gym's
``chain_sum``, solved in words, a term per line, with numbers of terms whose longest twentieth is ten times the median.

The policy takes so many steps of Adam towards right answers, where a trainer by reinforcement would follow rewards. Two
servers, one with its defaults and the warm head that learns (``--evolve idle``), one with ``--speculation off``, begin
with the default model and take its weights. The first answers some batches of other questions, and its head learns
after each, as it would have beside the policy's last updates. Then both answer 48 questions in three epochs, sampled at
temperature 1, with the same seeds, ended where the policy ends them; the first one's head may learn between epochs.
Prints the table of ``bench rollout`` and one JSON line, and writes rollout.svg and rollout.json to OUT.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import Any

import reasoning_gym
from bench_policy import CLOSE, LIKELY, Policy, Side, accept_length
from rich.console import Console

from slipstream.clients.admin import AdminClient
from slipstream.loadtest.children import free_port, running
from slipstream.loadtest.harness import connect
from slipstream.loadtest.rollout import RolloutOptions, as_json, plot_rollout, print_rollout, rollout

MEDIAN_TERMS, TAIL, MOST_TERMS = 3, 10.0, 40
PROMPTS, SAMPLES = 12, 4
LEARNED_TOKENS, LONGEST = 512, 1000
"""Of a text that the policy learns; of an answer."""
QUESTIONS = 32
"""Of a batch before the measurement."""
SIGMA = math.log(TAIL) / NormalDist().inv_cdf(0.95)


def terms(place: float) -> int:
    """That quantile of the number of terms."""
    return min(max(round(MEDIAN_TERMS * math.exp(SIGMA * NormalDist().inv_cdf(place))), 2), MOST_TERMS)


def chain_sum(count: int, seed: int) -> tuple[str, str]:
    """A question with so many terms, and its answer."""
    options = {"min_terms": count, "max_terms": count, "min_digits": 1, "max_digits": 2}
    entry: Any = reasoning_gym.create_dataset("chain_sum", size=1, seed=seed, **options)[0]
    expression = entry["metadata"]["expression"].split()
    total, *rest = expression
    lines = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        new = int(total) + (int(term) if sign == "+" else -int(term))
        doing = f"add {term} to" if sign == "+" else f"subtract {term} from"
        lines.append(f"Next, we {doing} {total}: {total} {sign} {term} = {new}.")
        total = str(new)
    assert total == entry["answer"]
    return entry["question"], "\n".join([f"We start with {expression[0]}.", *lines, f"So the final answer is {total}."])


def chain_sums(seed: str) -> Iterator[tuple[str, str]]:
    random = Random(seed)
    while True:
        yield chain_sum(terms(random.uniform(0.01, 0.99)), random.getrandbits(30))


def asked(seed: int) -> list[str]:
    """The questions that are measured: the quantiles of the numbers of terms, in random order."""
    random = Random(f"measured {seed}")
    found = [chain_sum(terms((i + 0.5) / PROMPTS), random.getrandbits(30))[0] for i in range(PROMPTS)]
    random.shuffle(found)
    return found


def write_questions(questions: list[str], path: Path) -> None:
    """As the ShareGPT file that ``bench rollout`` reads."""
    records = [{"id": str(i), "conversations": [{"from": "human", "value": q}]} for i, q in enumerate(questions)]
    path.write_text(json.dumps(records))


def command(port: int, *options: object) -> list[str]:
    given = ("--model", "default", "--port", port, "--target-lineage", "policy", "--stream-interval", 16, *options)
    return [sys.executable, "-P", "-m", "slipstream.server", "serve", *map(str, given)]


async def run(options: argparse.Namespace) -> None:
    out: Path = options.folder
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:.0f} s: {text}", flush=True)

    if options.updates:
        policy = Policy(options.model, options.rate, chain_sums, LEARNED_TOKENS)
        for update in range(1, options.updates + 1):
            loss = policy.learn()
            if update % 10 == 0:
                say(f"policy after {update} updates: {loss:.3f} nats per token")
        policy.model.save_pretrained(out / "policy")
        del policy
    learns: tuple[object, ...] = ("--drafter", "warm", "--registry", out / "registry", "--evolve", "idle")
    learns += ("--traffic-log", "features", "--traffic-folder", out / "traffic", "--traffic-topk", LIKELY)
    # A round ends when the gate is asked to judge it.
    learns += ("--evolve-first-tokens", "1000", "--evolve-round-tokens", options.round_tokens)
    learns += ("--canary-share", "0.6", "--canary-requests", "20")
    async with AsyncExitStack() as stack:
        sides = {}
        for name, more in (("ours", learns), ("plain", ("--speculation", "off"))):
            port = free_port()
            await stack.enter_async_context(running(name, command(port, *more), port, log=out / f"{name}.log"))
            url = f"http://127.0.0.1:{port}"
            target = await stack.enter_async_context(connect(url, timeout=1200, headers=CLOSE))
            sides[name] = Side(target, await stack.enter_async_context(AdminClient(url, headers=CLOSE)))
            await sides[name].take_weights(out / "policy", 1)
        ours = sides["ours"]
        await ours.admin.evolve("pause")
        questions, others = (chain_sums(f"{name} {options.seed}") for name in ("before", "trial"))
        learned = 0
        for batch in range(options.batches):
            ask = [question for question, _ in islice(questions, QUESTIONS)]
            texts = await ours.answers(ask, batch * QUESTIONS, LONGEST)
            await ours.end_trial(others, batch * QUESTIONS)
            learned, verdict = await ours.learn(learned, options.learn)
            version = await ours.live_version()
            say(f"batch {batch + 1}: accept length {accept_length(texts):.2f}, version {version} live; {verdict}")
        await ours.end_trial(others, options.batches * QUESTIONS)
        await ours.admin.evolve("resume")
        write_questions(asked(options.seed), out / "questions.json")
        measured = RolloutOptions(
            prompts=PROMPTS,
            samples=SAMPLES,
            median_tokens=LONGEST,
            tail=1.0,
            longest=LONGEST,
            natural=True,
            pause=options.pause,
            freeze=True,
            seed=options.seed,
            dataset=out / "questions.json",
            plot=out / "rollout.svg",
        )
        found = await rollout({name: side.target for name, side in sides.items()}, measured)
        print_rollout(found, measured, Console())
        plot_rollout(found, out / "rollout.svg")
        line = json.dumps({"live": await ours.live_version(), "servers": as_json(found)})
        (out / "rollout.json").write_text(line + "\n")
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the default model")
    parser.add_argument("--folder", type=Path, required=True, help="gets everything")
    parser.add_argument("--updates", type=int, default=80, help="of the policy, two steps of Adam each; 0: OUT has it")
    parser.add_argument("--rate", type=float, default=5e-5, help="of Adam")
    parser.add_argument(
        "--batches", type=int, default=8, help="before the measurement, after each of which a head learns"
    )
    parser.add_argument("--learn", type=int, default=9000, help="positions it learns after each of them")
    parser.add_argument(
        "--round-tokens", type=int, default=20_000, help="positions after which the gate judges, pauses too"
    )
    parser.add_argument("--pause", type=float, default=30, help="seconds between epochs, in which the head may learn")
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
