"""A small real model: tokens per second of real answers, and what a head makes of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from slipstream.drafter import warm
from slipstream.engine.checkpoint.checkpoint import DEFAULT_MODEL, locate, open_checkpoint
from slipstream.engine.errors import ModelError
from slipstream.engine.messages import SamplingParams
from slipstream.server.gpu_check import models
from slipstream.server.gpu_check.context import Context, NotThere, Part, streams_of
from slipstream.server.gpu_check.engines import config, engine, prompts
from slipstream.server.text import ChatTemplate, load_tokenizer

QUESTIONS = (
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What are the main differences between a virus and a bacterium?",
    "Summarize the plot of Romeo and Juliet for a child.",
    "How do I make a vegetable soup? List the steps.",
    "Translate 'Good morning, how are you?' into French and explain each word.",
    "Give me five ideas for a birthday party on a small budget.",
    "Why do we have leap years?",
)
ANSWER = 160
WANTED_RATIO = 2.0


class RealModel:
    """The model that was asked for, or the embedded one, with questions.

    Instead of it, in a dry run or where there is none, a small one that repeats the last token, with random ones.
    """

    def __init__(self, context: Context, or_another: bool) -> None:
        """Raises NotThere if there is no real one, and no dry run, unless another one will do."""
        self.path = self.name = context.options.model or DEFAULT_MODEL
        self.stop: tuple[int, ...] = ()
        self.is_real = False
        if context.dry_run and context.options.model is None:
            self._use_another(context)
            return
        try:
            checkpoint = open_checkpoint(self.path)
            tokenizer = load_tokenizer(locate(self.path))
        except ModelError as error:
            if not or_another:
                raise NotThere(f"a real model: {error}") from None
            self._use_another(context)
            return
        self.is_real = True
        ends: Any = checkpoint.generation_config.get("eos_token_id", checkpoint.config.get("eos_token_id", []))
        self.stop = tuple(ends) if isinstance(ends, list) else (ends,)
        template = tokenizer.own_template()
        self.texts: Sequence[list[int]] = [
            tokenizer.encode(_rendered(template, question), template is None) for question in QUESTIONS
        ]

    def _use_another(self, context: Context) -> None:
        shape = models.shape(context, "135M")
        self.path = str(models.with_weights(context, "echo", shape, 1.0))
        self.name = "135M shape, random weights"
        self.texts = prompts(len(QUESTIONS), 20, shape["vocab_size"])

    def params(self, answer: int) -> SamplingParams:
        return SamplingParams(max_tokens=answer, temperature=0.0, stop_token_ids=self.stop)


def _rendered(template: ChatTemplate | None, question: str) -> str:
    asked = [{"role": "user", "content": question}]
    return f"{question}\n" if template is None else template.render(asked, add_generation_prompt=True)


def parts(context: Context) -> Iterator[Part]:
    model = RealModel(context, or_another=False)
    found: dict[str, float] = {}
    for count in (1, 8) if context.dry_run else (1, 8, 32):
        yield Part(f"{streams_of(count)}", partial(_measure, context, model, count, {}, found))
    head = {"speculation": "head", "drafter": "warm" if _has_warm(model) else "cold"}
    yield Part("1 stream with a head", partial(_measure, context, model, 1, head, found))


def _has_warm(model: RealModel) -> bool:
    from slipstream.engine.config import EngineConfig

    return model.is_real and warm.find(EngineConfig(model=model.path)) is not None


def _measure(context: Context, model: RealModel, count: int, options: dict[str, Any], found: dict[str, float]) -> None:
    """Four questions to each stream, one after the other."""
    answer = 40 if context.dry_run else ANSWER
    with engine(config(context, model.path, **({"max_model_len": 512} | options))) as local:
        local.generate(model.texts[:count], model.params(8))  # warms up
        texts = [model.texts[number % len(model.texts)] for number in range(4 * count)]
        began = time.perf_counter()
        completions = []
        for first in range(0, len(texts), count):
            completions += local.generate(texts[first : first + count], model.params(answer))
        seconds = time.perf_counter() - began
    tokens = sum(len(completion.tokens) for completion in completions)
    drafted = sum(delta.num_drafted for completion in completions for delta in completion.deltas)
    accepted = sum(delta.num_accepted for completion in completions for delta in completion.deltas)
    with_head = str(options.get("drafter", "none"))
    context.row(
        "real answers",
        model=model.name,
        head=with_head,
        streams=count,
        tokens=tokens,
        tokens_per_s=tokens / seconds,
        accepted=accepted / drafted if drafted else None,
    )
    context.check(f"answers of {streams_of(count)}, head: {with_head}", tokens > 0, f"{tokens} tokens", "some")
    if not options:
        found[str(count)] = tokens / seconds
    elif "1" in found:
        ratio = tokens / seconds / found["1"]
        context.target(
            f"1 stream of {model.name}: times as fast with a head ({with_head})", ratio, at_least=WANTED_RATIO
        )
