"""Greedy output of the default model in float32 equals transformers', however the work is cut and mixed.

With equal history, two implementations may differ only where the two best logits are nearly equal. So every output
is replayed through transformers, which must find each of its tokens the most likely one, or less likely than that by
a logit gap below 1e-4. Between our own ways of running, tokens must be identical: row results do not depend on the
batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.testing import Completion, LocalEngine
from slipstream.kernels.native import library

Prompts = Callable[..., list[list[int]]]
GAP = 1e-4
CONFIG = EngineConfig(dtype="float32", max_model_len=1024, kv_cache_memory="256MiB")

pytestmark = [
    pytest.mark.usefixtures("quick_engines"),
    pytest.mark.skipif(library.load() is None, reason="needs row results that do not depend on the batch"),
]


def run(prompts: list[list[int]], length: int, rounds: int = 1, **options: Any) -> list[Completion]:
    engine = LocalEngine(EngineConfig(**(CONFIG.__dict__ | options)))
    params = SamplingParams(max_tokens=length, temperature=0.0)
    try:
        for _ in range(rounds):
            completions = engine.generate(prompts, params)
        return completions
    finally:
        engine.close()


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def check_every_way(prompts: list[list[int]], length: int, reference: Any) -> None:
    alone = tokens(run(prompts, length, max_running=1, prefix_caching=False))
    assert all(len(output) == length for output in alone)
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
    tight = run(prompts, length, max_model_len=longest, kv_cache_memory=f"{(longest + 16) * 46080}")
    assert sum(completion.num_preemptions for completion in tight) > 0
    assert tokens(tight) == alone


def assert_greedy(reference: Any, prompts: list[list[int]], outputs: list[list[int]]) -> None:
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        gaps = logits.amax(-1) - chosen
        assert float(gaps.max()) < GAP, f"a token is {float(gaps.max()):.2e} below the most likely one"


def test_greedy_equals_transformers(real_prompts: Prompts, reference_model: Any) -> None:
    check_every_way(real_prompts(5, longest=100), 20, reference_model)


@pytest.mark.slow
def test_greedy_equals_transformers_on_fifty_prompts(real_prompts: Prompts, reference_model: Any) -> None:
    check_every_way(real_prompts(50), 128, reference_model)


def test_the_replay_notices_a_wrong_token(real_prompts: Prompts, reference_model: Any) -> None:
    prompts = real_prompts(1, longest=100)
    output = tokens(run(prompts, 8))[0]
    output[4] = (output[4] + 1) % 49152
    with pytest.raises(AssertionError, match="below the most likely"):
        assert_greedy(reference_model, prompts, [output])
