"""A prompt of exactly the context length is computed with the real engine, when no answer is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.testing.local import TINY_LLAMA, LocalEngine

LENGTH = 256


@pytest.mark.parametrize("options", [{}, {"max_step_tokens": 48}, {"chunked_prefill": False}])
def test_every_position_is_scored(tmp_path: Path, options: dict[str, int]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    engine = LocalEngine(
        EngineConfig(model=str(tmp_path), load_format="dummy", dtype="float32", kv_cache_memory="16MiB", **options)
    )
    prompt = [index * 7 % 96 for index in range(LENGTH)]
    score = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=1)
    scored, again = engine.submit(prompt, score), engine.submit(prompt, score)
    shorter = engine.submit(prompt[:-1], replace(score, max_tokens=1))
    engine.finish()
    engine.close()
    assert scored.tokens == [] and scored.finish_reason == "length" and shorter.finish_reason == "length"
    [delta] = scored.deltas
    assert delta.prompt_logprobs is not None and len(delta.prompt_logprobs) == LENGTH
    assert again.deltas[0].prompt_logprobs == delta.prompt_logprobs
    assert shorter.deltas[0].prompt_logprobs == delta.prompt_logprobs[:-1]
