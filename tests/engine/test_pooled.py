"""Embeddings: the same to the bit however the prompt was cut, and in any company."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.testing import LocalEngine, policy, write_policy
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
