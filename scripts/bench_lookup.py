"""What lookups propose along texts that are known: how much of it is right, whether they know, and what asking takes.

    python scripts/bench_lookup.py [--texts 150] [--answers FILE]

Walks along the answers of ShareGPT's conversations (each after all that was said before it), or of FILE, a JSON list of
pairs of token lists, prompt and answer. Each drafter is asked for chains of eight, learns its acceptance as in the
engine, and goes on behind what was right. Prints per drafter tokens per step if all is verified; the mean squared error
of the chances it is given (Brier); the tokens gained per step, less a price for each draft token verified, where those
are verified whose chance exceeds the price; and microseconds per asking.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from slipstream.drafter.lookup import NGramDrafter, SuffixDrafter
from slipstream.engine.checkpoint.checkpoint import locate
from slipstream.engine.runner.acceptance import Acceptance, chances
from slipstream.engine.speculation.protocol import Drafter, DraftRow
from slipstream.engine.speculation.tree import depths
from slipstream.loadtest.dataset import ShareGPT
from slipstream.server.text import load_tokenizer

MOST = 8
CONTEXT, ANSWER = 1500, 300
"""Tokens before an answer, and of one, at most."""
CAPACITY = 200_000

Text = tuple[list[int], list[int]]
"""What comes before an answer, and the answer."""


def conversations(count: int) -> list[Text]:
    tokenizer = load_tokenizer(locate("default"))
    found: list[Text] = []
    with ShareGPT() as dataset:
        for _, conversation in dataset.conversations():
            before: list[int] = []
            for turn in conversation.turns:
                tokens = tokenizer.encode(turn.text, add_special_tokens=False)
                if turn.speaker == "gpt" and before:
                    found.append((before[-CONTEXT:], tokens[:ANSWER]))
                before = before + tokens
            if len(found) >= count:
                break
    return found[:count]


def measure(drafter: Drafter, texts: list[Text], price: float) -> str:
    acceptance = Acceptance(drafter.num_evidence, MOST)
    steps = tokens = 0
    seconds = gained = 0.0
    errors: list[float] = []
    for prompt, answer in texts:
        table = np.array(prompt + answer, np.int32)
        row = DraftRow(0, "", len(prompt), table, len(prompt), frozenset({drafter.name}), most=MOST)
        at = 0
        while at < len(answer):
            row.length = len(prompt) + at
            began = time.perf_counter()
            [proposal] = drafter.propose([row])
            seconds += time.perf_counter() - began
            right = 0
            if proposal is not None:
                places = depths(proposal.parents)
                rates = acceptance.rates(proposal.evidence, places)
                seen = []
                following = zip(proposal.tokens, answer[at:], proposal.evidence, places, rates, strict=False)
                for token, came, level, place, rate in following:
                    seen.append((level, place, token == came))
                    errors.append((rate - (token == came)) ** 2)
                    if token != came:
                        break
                    right += 1
                acceptance.observe(seen)
                verified = sum(chance > price for chance in chances(rates, proposal.parents, 1.0))
                gained += min(right, verified) - price * verified
            at += right + 1
            steps += 1
        tokens += len(answer)
        row.length = len(table)
        drafter.finish(row)
    return (
        f"{drafter.name:7s} {tokens / steps:11.3f} {np.mean(errors) if errors else 0:7.3f} {gained / steps:16.3f} "
        f"{1e6 * seconds / steps:7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=150)
    parser.add_argument("--answers", type=Path, help="instead of ShareGPT's")
    parser.add_argument("--price", type=float, default=0.3, help="of a draft token, in tokens")
    options = parser.parse_args()
    texts = json.loads(options.answers.read_text()) if options.answers else conversations(options.texts)
    print(f"{len(texts)} texts\ndrafter tokens/step   Brier  gained per step  microseconds")
    for drafter in (NGramDrafter(), SuffixDrafter(CAPACITY)):
        print(measure(drafter, texts, options.price), flush=True)


if __name__ == "__main__":
    main()
