"""Trains the drafter that comes with Slipstream, from real questions and the default model's own answers.

    python scripts/make_warm_drafter.py --minutes 120 --out drafter/warm/smollm2-135m-instruct.safetensors

Three stages, each of which goes on where it was stopped: answers (greedy, to ShareGPT's questions), features of every
position (one pass of the model), training from the model's last layer with a learning rate that falls. Ends with the
accept length on questions that were held out of training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np

from slipstream.drafter import warm
from slipstream.drafter.head import layout
from slipstream.drafter.traffic.recompute import Recompute
from slipstream.drafter.training.gate import score
from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.packing import Example, fill
from slipstream.drafter.training.target import Target
from slipstream.drafter.training.trainer import Trainer, TrainOptions
from slipstream.engine.checkpoint.checkpoint import locate
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.testing.local import LocalEngine
from slipstream.loadtest.dataset import ShareGPT
from slipstream.server.config import ServerConfig
from slipstream.server.preparing.text_model import load_text_model

HELD_OUT = 100
MOST_PROMPT, ANSWER = 1500, 256
STREAMS = 32
CONTEXT = 256
"""Positions of the prompt whose features are kept."""


def prompts() -> Iterator[list[int]]:
    """Questions as the default model's chat template shows them, in a fixed random order."""
    text = load_text_model("default", ServerConfig())
    assert text.template is not None
    with ShareGPT() as data:
        questions = dict.fromkeys(question for _, chat in data.conversations() if (question := chat.question()))
    order = list(questions)
    Random(7).shuffle(order)
    for question in order:
        shown = text.template.render([{"role": "user", "content": question}], add_generation_prompt=True)
        prompt = text.tokenizer.encode(shown, add_special_tokens=False)
        if len(prompt) <= MOST_PROMPT:
            yield prompt


def answer(file: Path, count: int) -> None:
    """Appends answers until there are so many."""
    done = len(file.read_text().splitlines()) if file.exists() else 0
    local = LocalEngine(EngineConfig(kv_cache_memory="1GiB", speculation="ngram,suffix"))
    stop = load_text_model("default", ServerConfig()).tokenizer.eos_token_ids
    params = SamplingParams(max_tokens=ANSWER, temperature=0.0, stop_token_ids=stop)
    todo = [prompt for _, prompt in zip(range(count), prompts(), strict=False)][done:]
    with file.open("a") as out:
        for at in range(0, len(todo), STREAMS):
            group = todo[at : at + STREAMS]
            for prompt, completion in zip(group, local.generate(group, params), strict=True):
                out.write(json.dumps({"prompt": prompt, "tokens": completion.tokens}) + "\n")
            print(f"{done + at + len(group)} answers", flush=True)
    local.close()


def examples(file: Path, target: Target) -> list[Example]:
    recompute: Recompute = target.recompute()
    found = []
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        tokens = np.array(entry["prompt"] + entry["tokens"], np.int32)
        start = max(len(entry["prompt"]) - CONTEXT, 0)
        if len(entry["tokens"]) > 3:
            found.append(Example(tokens, len(entry["prompt"]), start, recompute.features(tokens)[start:].clone()))
    return found


def train(texts: list[Example], target: Target, minutes: float, rate: float) -> TrainableHead:
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text.tokens[text.num_prompt :].tolist())
    config, tensors = target.cold_head(target.draft_tokens(counts, target.head.draft_vocab_size))
    head = target.trainable(config, tensors)
    trainer = Trainer(head, TrainOptions(learning_rate=rate))
    random, began = Random(0), time.monotonic()

    def stream() -> Iterator[Example]:
        while True:
            yield from random.sample(texts, len(texts))

    for group in fill(stream(), 2048, 1024):
        done = (time.monotonic() - began) / (60 * minutes)
        if done >= 1:
            break
        trainer.options = replace(trainer.options, learning_rate=rate * (1 - 0.95 * done))
        progress = trainer.learn([group])
        if trainer.step % 50 == 0:
            right = ", ".join(f"{share:.2f}" for share in progress.right)
            print(f"{done:4.0%} step {trainer.step}: loss {progress.loss:.2f}, right {right}", flush=True)
    return target.trainable(config, trainer.published())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--answers", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--folder", type=Path, default=Path("warm-drafter"), help="for what the stages leave")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    answer(options.folder / "answers.jsonl", options.answers + HELD_OUT)
    target = Target(str(locate("default")), 8192, 4096)
    texts = examples(options.folder / "answers.jsonl", target)
    held_out, texts = texts[:HELD_OUT], texts[HELD_OUT:]
    head = train(texts, target, options.minutes, options.rate)
    length = score(head, held_out, 3).accept_length(3)
    note = f"{len(texts)} answers, {options.minutes:g} minutes, accept length {length:.3f} at 3 draft tokens"
    warm.write(options.out, target.fingerprint, head.config, layout.stored(head.tensors()), note)
    print(note)


if __name__ == "__main__":
    main()
