"""What the target has computed waits for the head until it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from slipstream.drafter.head import layout
from slipstream.drafter.head.drafter import FEW, MOST_PENDING, FirstHead, HeadDrafter, _Pending
from slipstream.drafter.head.network import HeadNetwork
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams, SpeculationParams
from slipstream.engine.models.config import DecoderConfig
from slipstream.engine.testing import TINY_LLAMA, LocalEngine


def first_head(target: DecoderConfig) -> FirstHead:
    config = layout.config_for(target, 48)
    return FirstHead(config, layout.random_tensors(config, 1))


@pytest.fixture
def local(tmp_path: Path) -> LocalEngine:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    config = EngineConfig(
        model=str(tmp_path), load_format="dummy", kv_cache_memory="4MiB", speculation_policy="fixed", max_draft_tokens=3
    )
    return LocalEngine(config, [HeadDrafter(first_head, stop_below=0.0)])


def test_nothing_is_computed_for_a_head_that_is_not_asked(local: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[int] = []
    fuse = HeadNetwork.fuse

    def counted(self: HeadNetwork, features: torch.Tensor) -> torch.Tensor:
        fused.append(len(features))
        return fuse(self, features)

    monkeypatch.setattr(HeadNetwork, "fuse", counted)
    params = SamplingParams(max_tokens=6, temperature=0.0)
    local.submit(list(range(40)), params, speculation=SpeculationParams(max_draft_tokens=0))
    local.finish()
    assert not fused
    local.submit(list(range(40)), params)
    local.finish()
    assert fused[0] > 1 and len(fused) > 1


def test_what_waits_of_one_request_keeps_no_memory_of_others(local: LocalEngine) -> None:
    """A part is a piece of what one step computed: of single tokens, or of one request's prompt."""
    params = SamplingParams(max_tokens=8, temperature=0.0)
    silent = SpeculationParams(max_draft_tokens=0)
    long = local.submit([1] * 5, SamplingParams(max_tokens=60, temperature=0.0), speculation=silent)
    local.step()
    for number in range(6):
        local.submit([number] * 60, params, speculation=silent)
        for _ in range(4):
            local.step()
    runner = local.engine.runner
    row = next(
        drafts.draft
        for slot in range(8)
        if (drafts := runner._table.drafts(slot)) is not None and drafts.draft.request_id == long.request_id
    )
    pending = row.memory["head"]
    assert isinstance(pending, _Pending) and 5 < pending.count <= MOST_PENDING
    bytes_each = pending.parts[0][0].nbytes
    for part in pending.parts:
        assert part.untyped_storage().nbytes() <= FEW * 8 * bytes_each
    local.finish()
