"""Caches of 8 bits in an engine: windows and soft caps, prompts that are told, sleep, and weights that change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from slipstream.drafter.lookup import NGramDrafter
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.operations import (
    BeginTargetUpdate,
    FinishTargetUpdate,
    MemoryTag,
    ReadTarget,
    ReleaseMemory,
    ResumeMemory,
)
from slipstream.engine.speculation.protocol import Drafter
from slipstream.engine.testing.local import POLICY, Completion, LocalEngine, policy, write_policy

WINDOWED = POLICY | {"model_type": "mistral", "sliding_window": 40}
GEMMA = POLICY | {
    **{"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16},
    **{"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False},
    **{"rope_theta": 10000.0, "rope_local_base_freq": 10000.0},
}
MODELS = {"windows": WINDOWED, "Gemma 3": GEMMA}
TOLD = SamplingParams(max_tokens=40, temperature=0.7, seed=3, logprobs=1, prompt_logprobs=1)
PROMPTS = [[1, 2, 3], [*range(20)] * 5, [7] * 60, [*range(20)] * 5 + [3, 1]]
Open = Callable[..., LocalEngine]


@pytest.fixture(params=["int8", "fp8"])
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Open]:
    opened: list[LocalEngine] = []

    def engine(config: dict[str, Any], drafters: Sequence[Drafter] = (), **fields: Any) -> LocalEngine:
        folder = write_policy(tmp_path / "model", policy(0, config), config)
        options = {"kv_cache_memory": "1MiB", "max_running": 8, "dtype": "bfloat16", "pipeline": "off", "threads": 1}
        options |= {"kv_cache_dtype": request.param}
        opened.append(LocalEngine(EngineConfig(model=str(folder), **(options | fields)), drafters))
        return opened[-1]

    yield engine
    for each in opened:
        each.close()


def heard(completions: Sequence[Completion]) -> list[Any]:
    """All but what a prefix cache has read: a request that is told its prompt computes it."""
    return [
        json.dumps(
            [[_said(delta.logprobs), _said(delta.prompt_logprobs or [])] for delta in each.deltas if delta.tokens]
        )
        for each in completions
    ] + [each.tokens for each in completions]


def _said(entries: Sequence[Any]) -> list[Any]:
    return [entry and (entry.token, entry.logprob, entry.rank) for entry in entries]


@pytest.mark.parametrize("model", MODELS)
def test_answers_are_the_same_however_work_is_cut(engine: Open, model: str) -> None:
    plain = SamplingParams(max_tokens=40, temperature=0.7, seed=3)
    alone = [
        each.tokens for each in engine(MODELS[model], max_running=1, prefix_caching=False).generate(PROMPTS, plain)
    ]
    cut = engine(MODELS[model], [NGramDrafter()], max_step_tokens=24, draft_width=2)
    for _ in range(2):  # the second time with what is cached
        again = cut.generate([*PROMPTS, *PROMPTS], plain)
        assert [each.tokens for each in again] == [*alone, *alone]
    assert again[1].num_cached_tokens >= 64
    few = str(20 * cut.engine.loaded.block_bytes)
    tight = engine(MODELS[model], prefix_caching=False, kv_cache_memory=few)
    assert [each.tokens for each in tight.generate(PROMPTS[:1] * 8, plain)] == alone[:1] * 8
    assert tight.stats.preemptions  # they begin together, and there is no room for all of them to end


@pytest.mark.parametrize("weights", [False, True])
def test_who_slept_says_the_same(engine: Open, weights: bool) -> None:
    local = engine(WINDOWED)
    before = heard(local.generate(PROMPTS, TOLD))
    tags: tuple[MemoryTag, ...] = ("kv_cache", "weights") if weights else ("kv_cache",)
    local.operate(ReleaseMemory(tags, keep_weights=False), ResumeMemory(tags))
    assert heard(local.generate(PROMPTS, TOLD)) == before


def test_no_keys_of_other_weights_are_read(engine: Open, tmp_path: Path) -> None:
    local = engine(WINDOWED)
    local.generate(PROMPTS, TOLD)
    other = write_policy(tmp_path / "other", policy(1, WINDOWED), WINDOWED)
    local.operate(BeginTargetUpdate(2), ReadTarget(2, str(other)), FinishTargetUpdate(2))
    found = heard(local.generate(PROMPTS, TOLD))
    fresh = LocalEngine(
        EngineConfig(
            model=str(other),
            kv_cache_memory="1MiB",
            dtype="bfloat16",
            pipeline="off",
            threads=1,
            kv_cache_dtype=local.engine.ready().kv_cache_dtype,  # type: ignore[arg-type]
        )
    )
    assert heard(fresh.generate(PROMPTS, TOLD)) == found
    fresh.close()
