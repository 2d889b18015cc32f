"""Whether a drafter follows a policy that training moves: accept length over updates, following against frozen.

    python scripts/bench_policy.py --model FOLDER --folder OUT [--task sums] [--updates 30] [--rate 2e-5] [--learn 6000]

FOLDER is the default model as a Hugging Face folder (scripts/gguf_to_hf.py), which learns. Two servers begin with the
default model and its warm head.
Between two batches of sampled answers the policy takes a few steps of Adam towards the right answers of a task, where a
trainer by reinforcement would follow rewards, and both servers take the new weights; one trains its head on the answers
it gave (``--evolve idle``), so many positions after each batch, the other keeps its head. *sums* is a narrow task, of
which a policy becomes sure: two numbers are added digit by digit. *code* is a wide one: to go on with functions of
Python's standard library.

Both answer the same questions with the same seeds. What draws tokens does not depend on the drafter, so they write the
same texts, and what is compared is the heads alone; "same" in the table says how many of the texts are. Both verify
chains of three in every step, so what else the machine does changes nothing but how long it takes. Accept length is
tokens per step that verifies draft tokens; ranges are 90 % of a bootstrap over questions. Writes a table in Markdown
and a plot to OUT after every update, and goes on for at most ``--minutes``.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slipstream.clients.admin import AdminClient
from slipstream.loadtest.arrivals import ClosedLoop, drive
from slipstream.loadtest.children import free_port, running
from slipstream.loadtest.dataset import code_passages
from slipstream.loadtest.harness import Target, connect
from slipstream.loadtest.plots import Line, Panel, write_plot
from slipstream.loadtest.workloads import CONTINUE_CODE

DEPTH, STREAMS = 3, 32
ANSWER_TOKENS, LEARNED_TOKENS = 96, 192
BATCH, STEPS = 4, 2
"""Texts per step of Adam, and steps per update."""
CODE_CHARS = 600
FIRST_BATCHES = 3
"""The first batch is so many times as large: the gate needs eight texts of those one in ten that are held out."""
TRIAL_QUESTIONS = 8
"""More questions at a time until the trial of a version is over, which is no part of what is compared."""
IDLE_SECONDS = 20.0
"""A worker that has not begun a round by then has nothing to learn."""
CLOSE = {"Connection": "close"}
LIKELY = 8
"""Of the policy's tokens wherever one is sampled: of a sampled text the head learns distributions."""
RESAMPLES, RANGE = 1000, (0.05, 0.95)


Task = Callable[[str], Iterator[tuple[str, str]]]
"""Questions without end, each with its right answer; others for another seed."""


def sums(seed: str) -> Iterator[tuple[str, str]]:
    random = Random(seed)
    while True:
        one, other = random.randint(100, 999), random.randint(100, 999)
        lines, carry = [], 0
        for place, (a, b) in zip(
            ("Ones", "Tens", "Hundreds"), zip(str(one)[::-1], str(other)[::-1], strict=True), strict=True
        ):
            total = int(a) + int(b) + carry
            lines.append(f"{place}: {a} + {b} + {carry} = {total}, write {total % 10}, carry {total // 10}.")
            carry = total // 10
        yield f"Add {one} and {other}, digit by digit.", "\n".join([*lines, f"The sum is {one + other}."])


def code(seed: str) -> Iterator[tuple[str, str]]:
    for text in code_passages(Random(seed), CODE_CHARS):
        cut = text.find("\n", len(text) // 3) + 1
        yield CONTINUE_CODE + text[:cut], text[cut:]


TASKS: dict[str, Task] = {"sums": sums, "code": code}


class Policy:
    """The model that moves."""

    def __init__(self, folder: Path, rate: float, task: Task, longest: int = LEARNED_TOKENS) -> None:
        self.longest = longest
        """Tokens of a question and its answer that are learned, at most."""
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, betas=(0.9, 0.99))
        self.texts = task("policy")

    def learn(self) -> float:
        """The last step's loss, in nats per token."""
        loss = torch.zeros(())
        for _ in range(STEPS):
            examples = [self._example(*next(self.texts)) for _ in range(BATCH)]
            longest = max(len(tokens) for tokens, _ in examples)
            ids = torch.zeros(BATCH, longest, dtype=torch.long)
            labels = torch.full((BATCH, longest), -100)
            for row, (tokens, prompt) in enumerate(examples):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss.detach())

    def _example(self, question: str, answer: str) -> tuple[list[int], int]:
        """Tokens of a question and its answer, and how many are the question's."""
        turns = [{"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        start = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        end = self.tokenizer(answer + self.tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        return (start + end)[: self.longest], len(start)


def command(port: int, *options: object) -> list[str]:
    fixed = ("--speculation", "head", "--speculation-policy", "fixed", "--max-draft-tokens", DEPTH)
    given = ("--model", "default", "--port", port, "--target-lineage", "policy", "--drafter", "warm", *fixed, *options)
    return [sys.executable, "-P", "-m", "slipstream.server", "serve", *map(str, given)]


@dataclass(frozen=True, slots=True)
class Text:
    """An answer, and what became of the draft tokens on the way."""

    said: str
    steps: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Update:
    """What was found after an update of the policy."""

    following: list[Text]
    frozen: list[Text]
    loss: float
    version: int
    """Live in the end."""
    learned: int
    """Positions, by the end."""
    verdict: str


class Side:
    """A server, and what to ask it."""

    def __init__(self, target: Target, admin: AdminClient) -> None:
        self.target, self.admin = target, admin

    async def answers(self, questions: Sequence[str], first_seed: int, longest: int = ANSWER_TOKENS) -> list[Text]:
        """In the order of the questions, which have seeds from the first one on; of so many tokens at most."""
        found: dict[int, Text] = {}

        async def ask(number: int, due: float) -> None:
            body = {
                "model": self.target.model,
                "messages": [{"role": "user", "content": questions[number]}],
                "max_tokens": longest,
                "temperature": 1.0,
                "seed": first_seed + number,
                "return_metrics": True,
            }
            answer = await self.target.client.chat(body)
            counts = answer["metrics"]["speculative_decoding"]
            said = answer["choices"][0]["message"]["content"]
            found[number] = Text(said, counts["num_spec_steps"], counts["num_accepted_draft_tokens"])

        await drive(range(len(questions)), ClosedLoop(STREAMS), ask)
        return [found[number] for number in range(len(questions))]

    async def take_weights(self, weights: Path, version: int) -> None:
        await self.admin.begin_update(version)
        await self.admin.read(version, str(weights))
        await self.admin.finish_update(version)

    async def evolution(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.admin.status())["evolution"]
        return found

    async def live_version(self) -> int:
        live = [each["version"] for each in await self.admin.drafters() if each["state"] == "live"]
        return max(live, default=0)

    async def end_trial(self, questions: Iterator[tuple[str, str]], first_seed: int) -> None:
        """Asks more until no version is on trial, as rollouts of a larger batch would; nothing is learned meanwhile."""
        while (await self.evolution())["trial"] is not None:
            await self.answers([question for question, _ in islice(questions, TRIAL_QUESTIONS)], first_seed)

    async def learn(self, before: int, positions: int) -> tuple[int, str]:
        """Learns so many positions more and has the gate judge them; how many are learned by then, and the verdict.

        Where too little has come to begin a round it waits for nothing.
        """
        began = time.monotonic()
        rounds, told = sum((await self.evolution())["worker"]["rounds"].values()), False
        await self.admin.evolve("resume")
        while True:
            worker = (await self.evolution())["worker"]
            state, learned = worker["report"].get("state"), int(worker["tokens"])
            is_idle = time.monotonic() - began > IDLE_SECONDS and state in ("waiting", "failed")
            if is_idle or sum(worker["rounds"].values()) > rounds:
                await self.admin.evolve("pause")
                return learned, worker["verdict"].get("message", "")
            if learned >= before + positions and not told:
                told = True
                await self.admin.evolve("judge")
            await asyncio.sleep(0.2)


async def run(options: argparse.Namespace) -> None:
    began = time.monotonic()
    out: Path = options.folder
    out.mkdir(parents=True, exist_ok=True)
    policy, weights = Policy(options.model, options.rate, TASKS[options.task]), out / "policy"
    learns: tuple[object, ...] = (
        "--registry",
        out / "registry",
        "--traffic-log",
        "features",
        "--traffic-folder",
        out / "traffic",
    )
    # A round ends when the gate is asked to judge it.
    learns += ("--evolve", "idle", "--evolve-first-tokens", "1000", "--evolve-round-tokens", 1_000_000)
    learns += ("--traffic-topk", LIKELY, "--canary-share", "0.6", "--canary-requests", "20")
    found: list[Update] = []
    learned = 0
    async with AsyncExitStack() as stack:
        sides = []
        for name, more in (("following", learns), ("frozen", ())):
            port = free_port()
            await stack.enter_async_context(running(name, command(port, *more), port, log=out / f"{name}.log"))
            url = f"http://127.0.0.1:{port}"
            # A connection for each request: while the policy learns, idle ones are closed.
            target = await stack.enter_async_context(connect(url, timeout=1200, headers=CLOSE))
            sides.append(Side(target, await stack.enter_async_context(AdminClient(url, headers=CLOSE))))
        following, frozen = sides
        await following.admin.evolve("pause")
        questions, others = (TASKS[options.task](f"{name} {options.seed}") for name in ("asked", "trial"))
        first_seed = options.seed << 20
        for update in range(options.updates + 1):
            count = options.requests * (1 if update else FIRST_BATCHES)
            batch = [question for question, _ in islice(questions, count)]
            loss = 0.0
            if update:
                loss = policy.learn()
                policy.model.save_pretrained(weights)
                await asyncio.gather(*(side.take_weights(weights, update) for side in sides))
            texts = await following.answers(batch, first_seed)
            await following.end_trial(others, first_seed)
            # The worker has the lowest priority; beside the other server's answers it begins, and reads what came.
            (learned, verdict), same_texts = await asyncio.gather(
                following.learn(learned, options.learn), frozen.answers(batch, first_seed)
            )
            first_seed += count
            found.append(Update(texts, same_texts, loss, await following.live_version(), learned, verdict))
            report(out, found)
            print(f"{time.monotonic() - began:.0f} s: {row(update, found[-1])} {verdict}", flush=True)
            if time.monotonic() - began > 60 * options.minutes:
                break
    print(summary(found))


def accept_length(texts: Sequence[Text]) -> float:
    return 1 + sum(text.accepted for text in texts) / sum(text.steps for text in texts)


def ratios(pairs: Sequence[tuple[Text, Text]]) -> tuple[float, float, float]:
    """The accept length of the first of each pair over that of the second: as it is, and the ends of its range."""
    counts = np.array([[a.accepted, a.steps, b.accepted, b.steps] for a, b in pairs])
    draws = np.random.default_rng(0).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    sums = np.concatenate((counts.sum(0)[None], counts[draws].sum(1)))
    ratio = (1 + sums[:, 0] / sums[:, 1]) / (1 + sums[:, 2] / sums[:, 3])
    least, most = np.quantile(ratio[1:], RANGE)
    return float(ratio[0]), float(least), float(most)


def row(number: int, update: Update) -> str:
    """A line of the table."""
    pairs = list(zip(update.following, update.frozen, strict=True))
    ratio, least, most = ratios(pairs)
    same = sum(a.said == b.said for a, b in pairs)
    return (
        f"| {number} | {accept_length(update.following):.3f} | {accept_length(update.frozen):.3f} "
        f"| {ratio:.3f} ({least:.3f} – {most:.3f}) | {update.loss:.2f} | {update.version} "
        f"| {update.learned / 1000:.0f} | {same} of {len(pairs)} |"
    )


def report(out: Path, found: Sequence[Update]) -> None:
    lines = [
        "| update | following | frozen | ratio | policy's loss | live version | thousand positions learned | same |",
        "|---|---|---|---|---|---|---|---|",
        *(row(number, update) for number, update in enumerate(found)),
    ]
    (out / "policy.md").write_text("\n".join(lines) + "\n\n" + summary(found) + "\n")
    curves = [
        Line("head follows", [(float(i), accept_length(each.following)) for i, each in enumerate(found)]),
        Line("head frozen", [(float(i), accept_length(each.frozen)) for i, each in enumerate(found)]),
    ]
    marks = [(float(i), str(b.version)) for i, (a, b) in enumerate(pairwise(found), 1) if b.version != a.version]
    panel = Panel("dashed: a version is live from here on", "accept length, chains of 3", curves, 1.0, marks)
    write_plot(out / "policy.svg", "A policy moves and its drafter follows", "updates of the policy", [panel])


def summary(found: Sequence[Update]) -> str:
    last = found[-max(len(found) // 5, 1) :]
    ratio, least, most = ratios([pair for each in last for pair in zip(each.following, each.frozen, strict=True)])
    return (
        f"The last {len(last)} of {len(found) - 1} updates: {ratio:.3f} times the accept length of the frozen head "
        f"({least:.3f} – {most:.3f})."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the default model")
    parser.add_argument("--folder", type=Path, required=True, help="gets everything")
    parser.add_argument("--task", choices=TASKS, default="sums")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--requests", type=int, default=24, help="questions per update, of each server")
    parser.add_argument("--rate", type=float, default=2e-5, help="of Adam")
    parser.add_argument("--learn", type=int, default=6000, help="positions the head learns after each batch")
    parser.add_argument("--minutes", type=float, default=60, help="no update begins after that")
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
