"""A drafter that is promoted in the middle of an update of the target's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from slipstream.drafter.choice import make_drafters
from slipstream.drafter.head import layout
from slipstream.drafter.head.drafter import HeadDrafter
from slipstream.drafter.registry.fingerprint import served_fingerprint
from slipstream.drafter.registry.manifest import Training
from slipstream.drafter.registry.registry import Registry
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.config import decoder_config
from slipstream.engine.operations import (
    BeginTargetUpdate,
    FillTarget,
    FinishTargetUpdate,
    Operation,
    ReleaseMemory,
    ResumeMemory,
    SwapDrafter,
)
from slipstream.engine.testing.local import POLICY, LocalEngine, policy, write_policy


@pytest.mark.parametrize("at", range(4))
def test_it_drafts_with_the_rows_that_serve_whenever_it_comes(tmp_path: Path, at: int) -> None:
    """Also where nobody waits for one to be done before the other is asked for, and after a sleep."""
    model = write_policy(tmp_path / "model", policy(0))
    config = layout.config_for(decoder_config(POLICY), 16)
    tensors = layout.random_tensors(config, 0)
    rows = layout.draft_tokens(config, tensors)
    tensors["lm_head.weight"] = policy(0)["lm_head.weight"][rows]
    registry, target = Registry(tmp_path / "registry"), served_fingerprint(EngineConfig(model=str(model)))
    version = registry.add(
        config, tensors, target=target, origin="trained", training=Training(shares_output=True)
    ).version
    path = str(registry.path(version))
    options = EngineConfig(
        model=str(model),
        drafter=path,
        speculation="head",
        speculation_policy="fixed",
        max_draft_tokens=3,
        kv_cache_memory="4MiB",
        dtype="float32",
        threads=1,
    )
    [drafter] = make_drafters(options)
    assert isinstance(drafter, HeadDrafter)
    local = LocalEngine(options, [drafter])
    parts: list[Operation[object]] = [
        BeginTargetUpdate(1, "recompute"),
        FillTarget(1, save(policy(1))),
        FinishTargetUpdate(1),
    ]
    parts.insert(at, SwapDrafter(7, "", path))
    running = local.submit([1, 2, 3], SamplingParams(max_tokens=100, temperature=0.0))
    local.step()
    for done in [local.engine.operate(part) for part in parts]:
        local.wait(done)

    def is_right(seed: int) -> bool:
        output = drafter._held[""].weights.output
        assert output is not None
        expected = policy(seed)["lm_head.weight"][rows]
        return torch.equal(output.rows(torch.arange(16)).bfloat16(), expected.bfloat16())

    assert is_right(1)
    local.finish()
    assert running.finish_reason == "length"
    local.operate(ReleaseMemory(("weights", "kv_cache"), keep_weights=False))
    local.operate(ResumeMemory(("weights", "kv_cache")))
    assert is_right(0), "of the model's files again"
    [after] = local.generate([[1, 2, 3]], SamplingParams(max_tokens=20, temperature=0.0))
    assert {delta.drafter_version for delta in after.deltas if delta.num_drafted} == {7}
    local.close()
