"""What the target has computed waits for the head until it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.drafter.head import layout
from slipstream.drafter.head.drafter import FirstHead, HeadDrafter
from slipstream.drafter.head.network import HeadNetwork, HeadWeights
from slipstream.drafter.head.pending import LOOSE, Pending
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams, SpeculationParams
from slipstream.engine.models.config import DecoderConfig, decoder_config
from slipstream.engine.models.gpu_memory import HEAD_TAPS, HEAD_VERSIONS, MOST_PENDING, head_bytes, pending_bytes
from slipstream.engine.speculation.protocol import Computed, DraftRow
from slipstream.engine.testing.local import TINY_LLAMA, LocalEngine


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
    """Or no more than of some steps, in which no prompt was computed."""
    params = SamplingParams(max_tokens=8, temperature=0.0)
    silent = SpeculationParams(max_draft_tokens=0)
    long = local.submit([1] * 5, SamplingParams(max_tokens=100, temperature=0.0), speculation=silent)
    local.step()
    for number in range(20):
        local.submit([number] * 60, params, speculation=silent)
        for _ in range(4):
            local.step()
            drafts = (local.engine.runner._table.drafts(slot) for slot in range(8))
            row = next(each.draft for each in drafts if each is not None and each.draft.request_id == long.request_id)
            pending = row.memory["head"]
            assert isinstance(pending, Pending) and len(pending._loose) < LOOSE
            assert all(len(each.of_step) < 20 for each in pending._loose)
    assert pending.count > LOOSE
    pending.pack()
    for part in pending.parts():
        assert part.untyped_storage().nbytes() == part.nbytes
    local.finish()


@given(st.lists(st.integers(1, 600), min_size=1, max_size=60), st.integers(0, 50))
def test_the_last_positions_wait_in_their_order(counts: list[int], start: int) -> None:
    pending = Pending(start, torch.float32)
    features = torch.arange(sum(counts), dtype=torch.float32)[:, None, None]
    row, at = DraftRow(0, "", 1, np.zeros(1, np.int32), 1, frozenset()), 0
    for count in counts:
        pending.add(Computed(row, start + at, features, range(at, at := at + count)))
        assert pending.start + pending.count == start + at
    kept = torch.cat(pending.parts()).flatten()
    assert len(kept) == pending.count == min(sum(counts), MOST_PENDING)
    assert torch.equal(kept, features.flatten()[-pending.count :]) and pending.start == start + int(kept[0])


@given(st.lists(st.sampled_from([1, 1, 4, 33, 500, 700, 4000]), min_size=1, max_size=9), st.integers(1, 3))
def test_a_head_takes_no_more_of_a_gpu_than_is_set_aside(prompts: list[int], requests: int) -> None:
    """Whatever waits for it, with all memory that this keeps: of prompts in chunks, and of many steps since."""
    hidden, waiting = 4, [Pending(0, torch.bfloat16) for _ in range(requests)]
    row = DraftRow(0, "", 1, np.zeros(1, np.int32), 1, frozenset())
    steps = [(count, True) for count in prompts] + [(1, False)] * 100
    for count, is_prompt in steps:
        features = torch.zeros(requests * count, HEAD_TAPS, hidden)
        for at, pending in enumerate(waiting):
            pending.add(Computed(row, pending.start + pending.count, features, range(at * count, (at + 1) * count)))
            if is_prompt:
                pending.pack()
        parts = [part for pending in waiting for part in pending.parts()]
        kept = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
        of_a_position = pending_bytes(decoder_config(TINY_LLAMA | {"hidden_size": hidden}), torch.bfloat16)
        assert sum(kept.values()) <= requests * MOST_PENDING * of_a_position


def test_two_versions_of_a_head_have_room(local: LocalEngine) -> None:
    target = local.engine.loaded.model.decoder
    assert target is not None
    head = HeadWeights(first_head(target.config).config, target)
    assert HEAD_VERSIONS * head.memory_bytes <= head_bytes(target.config, target.formats.compute)
