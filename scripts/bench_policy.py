"""Whether a drafter follows a policy that training moves: accept length over updates, following against frozen.

    python scripts/bench_policy.py --model FOLDER --folder OUT [--task sums] [--updates 30] [--rate 2e-5] [--learn 6000]

FOLDER is the default model as a Hugging Face folder (scripts/gguf_to_hf.py), which learns. Two servers begin with the
default model and its warm head.
Between two batches of sampled answers the policy takes a few steps of Adam towards the right answers of a task, where a
trainer by reinforcement would follow rewards, and both servers take the new weights; one trains its head on the answers
it gave (``--evolve idle``), so many positions after each batch, the other keeps its head. *sums* is a narrow task, of
which a policy becomes sure: two numbers are added digit by digit. *code* is a wide one: to go on with functions of
Python's standard library. Both verify chains of three in every step, so the answers' accept length is that of the head
alone, and what else the machine does changes nothing but how long it takes. Every turn of one is the other's
standstill. Writes a table in Markdown and a plot to OUT.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slipstream.clients.admin import AdminClient
from slipstream.loadtest.arrivals import ClosedLoop
from slipstream.loadtest.children import free_port, running
from slipstream.loadtest.dataset import code_passages
from slipstream.loadtest.harness import Target, connect, measure
from slipstream.loadtest.plots import Line, Panel, write_plot
from slipstream.loadtest.processes import ProcessTree
from slipstream.loadtest.scrape import read_speculation
from slipstream.loadtest.workloads import CHAT, CONTINUE_CODE, Request

DEPTH, STREAMS = 3, 32
ANSWER_TOKENS, LEARNED_TOKENS = 96, 192
BATCH, STEPS = 4, 2
"""Texts per step of Adam, and steps per update."""
CODE_CHARS = 600
IDLE_SECONDS = 5.0
"""A worker that has not begun a round by then has nothing to learn."""
CLOSE = {"Connection": "close"}
LIKELY = 8
"""Of the policy's tokens wherever one is sampled: of a sampled text the head learns distributions."""


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

    def __init__(self, folder: Path, rate: float, task: Task) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, betas=(0.9, 0.99))
        self.texts = task("policy")

    def learn(self) -> float:
        """The last step's loss, in nats per token."""
        loss = torch.zeros(())
        for _ in range(STEPS):
            asked = [self._example(*next(self.texts)) for _ in range(BATCH)]
            longest = max(len(tokens) for tokens, _ in asked)
            ids = torch.zeros(BATCH, longest, dtype=torch.long)
            labels = torch.full((BATCH, longest), -100)
            for row, (tokens, prompt) in enumerate(asked):
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
        return (start + end)[:LEARNED_TOKENS], len(start)


def command(port: int, *options: object) -> list[str]:
    fixed = ("--speculation", "head", "--speculation-policy", "fixed", "--max-draft-tokens", DEPTH)
    given = ("--model", "default", "--port", port, "--target-lineage", "policy", "--drafter", "warm", *fixed, *options)
    return [sys.executable, "-P", "-m", "slipstream.server", "serve", *map(str, given)]


def asked(question: str) -> Request:
    fields = {"max_tokens": ANSWER_TOKENS, "temperature": 1.0}
    return Request(CHAT, {"messages": [{"role": "user", "content": question}], **fields})


async def accept_length(target: Target, requests: list[Any]) -> float:
    before = await read_speculation(target.client)
    run = await measure(target, requests, ClosedLoop(STREAMS))
    after = await read_speculation(target.client)
    assert before is not None and after is not None
    assert all(record.ok for record in run.records), run.records
    counts = after - before
    return 1 + counts.accepted_tokens / counts.drafts


async def take_weights(admin: AdminClient, weights: Path, version: int) -> None:
    await admin.begin_update(version)
    await admin.read(version, str(weights))
    await admin.finish_update(version)


async def learn(admin: AdminClient, before: int, positions: int) -> int:
    """Waits until so many more are learned, and judged if a round is over; how many are learned now.

    Nothing is learned while a version is on trial, nor where too little has come; then it waits for nothing.
    """
    began = time.monotonic()
    while True:
        evolution = (await admin.status())["evolution"]
        worker = evolution["worker"]
        state, learned = worker["report"].get("state"), int(worker["tokens"])
        is_idle = time.monotonic() - began > IDLE_SECONDS and state in ("waiting", "failed")
        if evolution["trial"] is not None or is_idle or (learned >= before + positions and state != "gating"):
            return learned
        await asyncio.sleep(0.5)


async def run(options: argparse.Namespace) -> None:
    out: Path = options.folder
    out.mkdir(parents=True, exist_ok=True)
    policy, weights = Policy(options.model, options.rate, TASKS[options.task]), out / "policy"
    learns = ("--registry", out / "registry", "--traffic-log", "features", "--traffic-folder", out / "traffic")
    learns += ("--evolve", "idle", "--evolve-first-tokens", "1000", "--evolve-round-tokens", options.round_tokens)
    learns += ("--traffic-topk", LIKELY, "--canary-share", "0.65", "--canary-requests", "20")
    found: list[tuple[float, float, float, int]] = []
    learned = 0
    async with AsyncExitStack() as stack:
        sides = []
        for name, more in (("following", learns), ("frozen", ())):
            port = free_port()
            log = out / f"{name}.log"
            process = await stack.enter_async_context(running(name, command(port, *more), port, log=log))
            url = f"http://127.0.0.1:{port}"
            # A connection for each request: a server that stood still closes those that were idle meanwhile.
            target = await stack.enter_async_context(connect(url, timeout=1200, headers=CLOSE))
            admin = await stack.enter_async_context(AdminClient(url, headers=CLOSE))
            sides.append((ProcessTree(process.pid), target, admin))
        (following, target, admin), (frozen, other_target, other_admin) = sides
        questions = TASKS[options.task](f"asked {options.seed}")
        for update in range(options.updates + 1):
            requests = [asked(question) for question, _ in islice(questions, options.requests)]
            loss = 0.0
            if update:
                with following.frozen(), frozen.frozen():
                    loss = policy.learn()
                    policy.model.save_pretrained(weights)
                for each in (admin, other_admin):
                    await take_weights(each, weights, update)
            with following.frozen():
                without = await accept_length(other_target, requests[::2])
            with frozen.frozen():
                length = await accept_length(target, requests)
                learned = await learn(admin, learned, options.learn)
                versions = [each for each in await admin.drafters() if each["state"] == "live"]
                worker = (await admin.status())["evolution"]["worker"]
            live = versions[-1]["version"] if versions else 0
            found.append((length, without, loss, live))
            report(out, found)
            said = worker["verdict"].get("message", "")
            print(
                f"{update:3d}: following {length:.3f}, frozen {without:.3f}, loss {loss:.3f}, live {live}, "
                f"{learned} positions learned; {said}",
                flush=True,
            )
    print(summary(found))


def report(out: Path, found: list[tuple[float, float, float, int]]) -> None:
    lines = ["| update | following | frozen | ratio | policy's loss | live version |", "|---|---|---|---|---|---|"]
    for update, (length, without, loss, live) in enumerate(found):
        lines.append(f"| {update} | {length:.2f} | {without:.2f} | {length / without:.2f} | {loss:.2f} | {live} |")
    (out / "policy.md").write_text("\n".join(lines) + "\n")
    curves = [
        Line("head follows", [(float(i), length) for i, (length, *_) in enumerate(found)]),
        Line("head frozen", [(float(i), without) for i, (_, without, *_) in enumerate(found)]),
    ]
    marks = [(float(i), str(found[i][3])) for i in range(1, len(found)) if found[i][3] != found[i - 1][3]]
    panel = Panel("dashed: a version goes live", "accept length, chains of 3", curves, 1.0, marks)
    write_plot(out / "policy.svg", "A policy moves and its drafter follows", "updates of the policy", [panel])


def summary(found: list[tuple[float, float, float, int]]) -> str:
    last = found[-max(len(found) // 5, 1) :]
    ratio = sum(length for length, *_ in last) / sum(without for _, without, *_ in last)
    return f"the last {len(last)} updates: {ratio:.3f} times the accept length of the frozen head"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the default model")
    parser.add_argument("--folder", type=Path, required=True, help="gets everything")
    parser.add_argument("--task", choices=TASKS, default="sums")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--requests", type=int, default=32, help="answers per update; of the frozen head half of them")
    parser.add_argument("--rate", type=float, default=2e-5, help="of Adam")
    parser.add_argument("--learn", type=int, default=6000, help="positions the head learns after each batch")
    parser.add_argument("--round-tokens", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
