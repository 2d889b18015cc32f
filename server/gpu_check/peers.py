"""Other programs on the same device with the same sizes, weights that say nothing, and the same requests."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from slipstream.server.gpu_check import models
from slipstream.server.gpu_check.context import Context, NotThere, Part, streams_of
from slipstream.server.gpu_check.engines import prompts
from slipstream.server.gpu_check.throughput import LONG_ANSWER, LONG_PROMPT, PROMPT, STEPS

NAME = "8B"
Generate = Callable[[list[list[int]], int, float], int]
"""Greedy answers of exactly so many tokens to all prompts at once, or in so many seconds: how many tokens came."""


def parts(context: Context) -> Iterator[Part]:
    if not context.options.compare and not context.dry_run:
        raise NotThere("no other program was asked for; --compare transformers")
    for name in context.options.compare or ("transformers",):
        yield Part(name, partial(_compare, context, name))


def _compare(context: Context, name: str) -> None:
    if find_spec(name) is None:
        raise NotThere(f"{name} is not installed")
    generate = PROGRAMS[name](context)
    counts = (1, 3) if context.dry_run else (1, 32, 256)
    prompt, answer = (20, 8) if context.dry_run else (PROMPT, STEPS)
    for count in counts:
        seconds, tokens = _time(context, generate, count, prompt, answer)
        # What the prompts take is left out by asking for one token alone, too.
        first, _ = _time(context, generate, count, prompt, 1)
        context.row(
            "other programs, decoding",
            program=name,
            model=f"{NAME} shape",
            streams=count,
            prompt=prompt,
            tokens_per_s=(tokens - count) / (seconds - first) if seconds > first else None,
            slipstream=context.kept.get(f"{NAME}, {streams_of(count)}"),
        )
    prompt, answer = (30, 12) if context.dry_run else (LONG_PROMPT, LONG_ANSWER)
    count, (seconds, tokens) = _most_that_fits(context, name, generate, counts[-1], prompt, answer)
    ours = context.kept.get(f"{NAME}, whole") if count == counts[-1] else None
    context.row(
        "other programs, whole requests",
        program=name,
        model=f"{NAME} shape",
        streams=count,
        prompt=prompt,
        answer=tokens // count,
        tokens_per_s=tokens / seconds,
        slipstream=ours,
    )
    if ours is not None:
        what = f"{streams_of(count)}, whole requests: times as fast as {name}"
        context.target(what, ours * seconds / tokens, at_least=1)


def _most_that_fits(
    context: Context, name: str, generate: Generate, count: int, prompt: int, answer: int
) -> tuple[int, tuple[float, int]]:
    """How many streams there was memory for, by halves, and what ``_time`` says of them."""
    while True:
        try:
            return count, _time(context, generate, count, prompt, answer)
        except torch.cuda.OutOfMemoryError:
            context.note(f"{name} has no memory for {streams_of(count)} of {prompt} + {answer} tokens.")
            if count == 1:
                raise
        count //= 2
        gc.collect()
        torch.cuda.empty_cache()


def _time(context: Context, generate: Generate, count: int, prompt: int, answer: int) -> tuple[float, int]:
    if (left := context.left()) < 0:
        raise TimeoutError(f"the stage's time was over before {streams_of(count)}")
    texts = prompts(count, prompt, models.shape(context, NAME)["vocab_size"], count)
    began = time.perf_counter()
    tokens = generate(texts, answer, left)
    seconds = time.perf_counter() - began
    if not tokens or (tokens != count * answer and seconds < left):
        raise RuntimeError(f"{tokens} tokens came instead of {count * answer}")
    return seconds, tokens


def _transformers(context: Context) -> Generate:
    """``generate`` as it comes: with torch's attention and a cache that grows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = models.shape(context, NAME)
    dtype = torch.bfloat16 if context.on_gpu else torch.float32
    with context.device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype).eval()

    @torch.inference_mode()
    def generate(texts: list[list[int]], answer: int, most_s: float) -> int:
        ids = torch.tensor(texts, device=context.device)
        lengths: dict[str, Any] = {"max_new_tokens": answer, "min_new_tokens": answer, "max_time": most_s}
        mask = torch.ones_like(ids)
        found = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
        tokens = (found.shape[1] - ids.shape[1]) * len(texts)
        del found
        gc.collect()
        if context.on_gpu:
            torch.cuda.synchronize()
        return int(tokens)

    generate(prompts(1, 8, shape["vocab_size"]), 2, context.left())
    return generate


def _vllm(context: Context) -> Generate:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    path = models.folder(context, NAME, models.shape(context, NAME))
    longest = LONG_PROMPT + LONG_ANSWER + 1
    model = LLM(
        model=str(path),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=longest,
        dtype="bfloat16",
        enable_prefix_caching=False,
    )

    def generate(texts: list[list[int]], answer: int, _: float) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": text} for text in texts]
        return sum(len(each.outputs[0].token_ids) for each in model.generate(asked, params, use_tqdm=False))

    generate([[1, 2, 3]], 2, context.left())
    return generate


def _sglang(context: Context) -> Generate:
    import sglang  # type: ignore[import-not-found]

    path = models.folder(context, NAME, models.shape(context, NAME))
    model = sglang.Engine(
        model_path=str(path), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", disable_radix_cache=True
    )

    def generate(texts: list[list[int]], answer: int, _: float) -> int:
        params = {"temperature": 0.0, "max_new_tokens": answer, "ignore_eos": True}
        found = model.generate(input_ids=texts, sampling_params=params)
        return sum(each["meta_info"]["completion_tokens"] for each in found)

    generate([[1, 2, 3]], 2, context.left())
    return generate


PROGRAMS: dict[str, Callable[[Context], Generate]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "sglang": _sglang,
}
