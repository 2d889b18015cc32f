"""Embeddings: the same to the bit however the prompt was cut, and in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.operations import BeginTargetUpdate, FillTarget, FinishTargetUpdate, Pause, Resume, UpdateMode
from slipstream.engine.testing.local import LocalEngine, policy, write_policy
from slipstream.kernels.native import library

PROMPTS = [[(7 * i + seed) % 32 for i in range(90 + seed)] for seed in range(4)]


@pytest.mark.skipif(library.load() is None, reason="needs row results that do not depend on the batch")
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_does_not_depend_on_how_its_prompt_is_cut(tmp_path: Path, pooling: str) -> None:
    model = str(write_policy(tmp_path, policy(0)))
    found = []
    for options in ({"max_step_tokens": 512}, {"max_step_tokens": 7, "max_running": 4}, {"max_step_tokens": 1}):
        config = EngineConfig(model=model, kv_cache_memory="4MiB", dtype="float32", threads=1, **options)
        local = LocalEngine(config)
        done = local.generate(PROMPTS, SamplingParams(max_tokens=0, pooling=pooling))  # type: ignore[arg-type]
        found.append([each.deltas[-1].embedding for each in done])
        local.close()
    assert all(found[0]) and found[1:] == found[:1] * 2


@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.parametrize("asked", [{"pooling": "mean"}, {"prompt_logprobs": 1}], ids=str)
def test_what_is_told_of_a_prompt_is_of_one_set_of_weights(tmp_path: Path, asked: Any, mode: UpdateMode) -> None:
    """An update that comes while the prompt is computed has it computed anew, also where requests go on."""
    folders = [write_policy(tmp_path / str(seed), policy(seed)) for seed in range(2)]
    params = SamplingParams(max_tokens=0, **asked)
    local, fresh = (
        LocalEngine(
            EngineConfig(
                model=str(folder), kv_cache_memory="4MiB", dtype="float32", threads=1, max_step_tokens=16, max_running=8
            )
        )
        for folder in folders
    )
    [expected] = fresh.generate(PROMPTS[:1], params)
    request = local.submit(PROMPTS[0], params)
    for _ in range(3):
        local.step()
    assert not request.deltas
    local.operate(Pause("keep"), BeginTargetUpdate(1, mode), FillTarget(1, save(policy(1))))
    local.operate(FinishTargetUpdate(1), Resume())
    local.finish()
    told, wanted = request.deltas[0], expected.deltas[0]
    assert (told.embedding, told.prompt_logprobs) == (wanted.embedding, wanted.prompt_logprobs)
    local.close()
    fresh.close()
