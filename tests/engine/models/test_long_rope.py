"""Rotary positions that depend on length: no result depends on what else is in the step, nor on how prompts are cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.speculation.oracles import OracleDrafter
from slipstream.engine.testing.local import LocalEngine

ORIGINAL = 64
PHI3 = {
    "model_type": "phi3",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": ORIGINAL,
    "pad_token_id": 0,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.6, 1.8, 2.0],
        "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 11.0, 14.0, 17.0],
    },
}
DYNAMIC = {
    "model_type": "llama",
    **{key: PHI3[key] for key in PHI3 if key not in ("model_type", "rope_scaling", "original_max_position_embeddings")},
    "max_position_embeddings": ORIGINAL,
    "rope_scaling": {"type": "dynamic", "factor": 4.0},
}
LENGTHS = (9, ORIGINAL - 4, ORIGINAL, ORIGINAL + 1, 150)
"""Prompts that stay below the original length, outgrow it, and begin beyond it."""
COUNT = 16
GREEDY = SamplingParams(max_tokens=COUNT, temperature=0.0)
PROMPTS = [np.random.default_rng(length).integers(5, 150, length).tolist() for length in LENGTHS]


def start(folder: Any, drafters: Any = (), **options: Any) -> LocalEngine:
    config = EngineConfig(model=str(folder), dtype="float32", kv_cache_memory="1MiB", **options)
    return LocalEngine(config, drafters)


def texts(engine: LocalEngine, prompts: list[list[int]]) -> list[list[int]]:
    return [completion.tokens for completion in engine.generate(prompts, GREEDY)]


def test_longrope_alone_in_a_batch_chunked_and_cached(tiny_model: Callable[[dict[str, Any]], Any]) -> None:
    model = tiny_model(PHI3)
    expected = [model.generate(prompt, COUNT) for prompt in PROMPTS]
    assert len({token for text in expected for token in text}) > 20, "such texts would prove little"
    engine = start(model.folder, max_step_tokens=32)
    assert texts(engine, PROMPTS) == expected
    # Prefixes are cached now, of short sequences and of long ones; a long prompt may begin as a short one did.
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert texts(engine, [prompt]) == [text]
        longer = prompt[:48] + PROMPTS[-1][:40]
        assert texts(engine, [longer]) == [model.generate(longer, COUNT)]
    engine.close()
    for options in ({"pipeline": "on", "speculation": "off"}, {"prefix_caching": False, "max_running": 2}):
        engine = start(model.folder, **options)
        assert texts(engine, PROMPTS) == expected
        engine.close()


def test_drafts_do_not_reach_beyond_the_switch(tiny_model: Callable[[dict[str, Any]], Any]) -> None:
    model = tiny_model(PHI3)
    expected = [model.generate(prompt, COUNT) for prompt in PROMPTS]
    answers = {tuple(prompt): text for prompt, text in zip(PROMPTS, expected, strict=True)}
    engine = start(model.folder, [OracleDrafter(answers, 0.8)], speculation_policy="fixed", max_draft_tokens=6)
    completions = engine.generate(PROMPTS, GREEDY)
    assert [completion.tokens for completion in completions] == expected
    assert sum(delta.num_accepted for completion in completions for delta in completion.deltas) > 10
    assert all(completion.num_preemptions == 0 for completion in completions)
    engine.close()


def test_dynamic_ntk_depends_on_the_sequence_only(tiny_model: Callable[[dict[str, Any]], Any]) -> None:
    model = tiny_model(DYNAMIC)
    engine = start(model.folder, max_step_tokens=32)
    assert engine.engine.loaded.max_model_len == 4 * ORIGINAL
    batched = texts(engine, PROMPTS)
    alone = [texts(engine, [prompt])[0] for prompt in PROMPTS]
    engine.close()
    engine = start(model.folder, prefix_caching=False)
    fresh = [texts(engine, [prompt])[0] for prompt in PROMPTS]
    engine.close()
    assert batched == alone == fresh
    # transformers' own result depends on how a longer prompt is cut; up to the original length it does not.
    assert batched[0] == model.generate(PROMPTS[0], COUNT)
    shortest = ORIGINAL - LENGTHS[1] + 1
    assert batched[1][:shortest] == model.generate(PROMPTS[1], shortest)


@pytest.mark.parametrize("config", [PHI3, DYNAMIC], ids=["longrope", "dynamic"])
def test_a_short_context_never_switches(tiny_model: Callable[[dict[str, Any]], Any], config: dict[str, Any]) -> None:
    model = tiny_model(config)
    engine = start(model.folder, max_model_len=ORIGINAL)
    assert texts(engine, PROMPTS[:1]) == [model.generate(PROMPTS[0], COUNT)]
    engine.close()
