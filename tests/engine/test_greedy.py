"""Greedy output of the default model in float32 equals transformers', however the work is cut and mixed.

With equal history, two implementations may differ only where the two best logits are nearly equal. So every output
is replayed through transformers, which must find each of its tokens the most likely one, or less likely than that by
a logit gap below 1e-4. Between our own ways of running, tokens must be identical: row results do not depend on the
batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.testing.local import Completion, LocalEngine
from slipstream.kernels.native import library

Prompts = Callable[..., list[list[int]]]
GAP = 1e-4
CONFIG = EngineConfig(dtype="float32", max_model_len=1024, kv_cache_memory="256MiB")

pytestmark = [
    pytest.mark.usefixtures("quick_engines"),
    pytest.mark.skipif(library.load() is None, reason="needs row results that do not depend on the batch"),
]


def run_with(
    form: dict[str, Any], prompts: list[list[int]], length: int, rounds: int = 1, **options: Any
) -> list[Completion]:
    engine = LocalEngine(EngineConfig(**(CONFIG.__dict__ | form | options)))
    params = SamplingParams(max_tokens=length, temperature=0.0)
    try:
        for _ in range(rounds):
            completions = engine.generate(prompts, params)
        return completions
    finally:
        engine.close()


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def check_every_way(prompts: list[list[int]], length: int, reference: Any, form: dict[str, Any] | None = None) -> None:
    run = partial(run_with, form or {})
    alone = tokens(run(prompts, length, max_running=1, prefix_caching=False))
    assert all(len(output) == length for output in alone)
    if reference is not None:
        assert_greedy(reference, prompts, alone)

    assert tokens(run(prompts, length, max_running=16)) == alone
    assert tokens(run(prompts, length, max_running=16, pipeline="on")) == alone

    chunked = run(prompts, length, max_running=8, max_step_tokens=24, prefix_caching=False)
    assert tokens(chunked) == alone

    hits = run(prompts, length, rounds=2, kv_cache_memory="1GiB")
    assert all(
        completion.num_cached_tokens >= len(prompt) // 16 * 16 - 16
        for completion, prompt in zip(hits, prompts, strict=True)
    )
    assert tokens(hits) == alone

    longest = max(len(prompt) for prompt in prompts) + length
    bytes_per_token = 46080 if (form or {}).get("dtype", "float32") == "float32" else 23040
    tight = run(prompts, length, max_model_len=longest, kv_cache_memory=f"{(longest + 16) * bytes_per_token}")
    assert sum(completion.num_preemptions for completion in tight) > 0
    assert tokens(tight) == alone


def assert_greedy(reference: Any, prompts: list[list[int]], outputs: list[list[int]]) -> None:
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        gaps = logits.amax(-1) - chosen
        assert float(gaps.max()) < GAP, f"a token is {float(gaps.max()):.2e} below the most likely one"


FORMS: list[dict[str, Any]] = [{}, {"weights": "packed", "packed_arithmetic": "exact"}]


@pytest.mark.parametrize("form", FORMS, ids=["float32", "exact"])
def test_greedy_equals_transformers(real_prompts: Prompts, reference_model: Any, form: dict[str, Any]) -> None:
    check_every_way(real_prompts(3, longest=100), 12, reference_model, form)


def test_int8_says_the_same_in_every_way(real_prompts: Prompts) -> None:
    """Other tokens than transformers now and then, but the same however the work is cut and mixed."""
    form = {"weights": "packed", "packed_arithmetic": "int8", "dtype": "bfloat16"}
    check_every_way(real_prompts(3, longest=100), 12, None, form)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=["float32", "exact"])
def test_long_answers_equal_transformers(real_prompts: Prompts, reference_model: Any, form: dict[str, Any]) -> None:
    check_every_way(real_prompts(16), 128, reference_model, form)


def test_the_replay_notices_a_wrong_token(real_prompts: Prompts, reference_model: Any) -> None:
    prompts = real_prompts(1, longest=100)
    output = tokens(run_with({}, prompts, 8))[0]
    output[4] = (output[4] + 1) % 49152
    with pytest.raises(AssertionError, match="below the most likely"):
        assert_greedy(reference_model, prompts, [output])
