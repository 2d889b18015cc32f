"""Chains that a network makes in one call are those that it makes token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from slipstream.drafter.choosing import Draft
from slipstream.drafter.head.drafter import FirstHead, HeadDrafter
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.testing.local import TINY_LLAMA, LocalEngine, policy, write_policy
from slipstream.kernels.native.library import isa
from tests.drafter.test_head import make_head

pytestmark = pytest.mark.skipif(isa() is None, reason="there are no compiled kernels")


class Twice(HeadDrafter):
    """Drafts in both ways, and compares."""

    def __init__(self, stop_below: float) -> None:
        super().__init__(lambda target: FirstHead(*make_head(target)), stop_below)
        self.lengths: list[tuple[int, int]] = []
        """How long each chain is, and how long it was wanted."""

    def _draft_at_once(self, drafts: list[Draft], hidden: Tensor) -> bool:
        others, before = [Draft(draft.row, draft.room) for draft in drafts], hidden.clone()
        assert super()._draft_at_once(drafts, hidden)
        super()._draft_by_depth(others, before)
        for draft, other in zip(drafts, others, strict=True):
            assert (draft.tokens, draft.parents) == (other.tokens, other.parents)
            assert draft.likely == pytest.approx(other.likely, rel=1e-5)
            assert draft.chance == pytest.approx(other.chance, rel=1e-5)
            self.lengths.append((len(draft.tokens), draft.row.most))
        return True


PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 0.0},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.3},
    {"temperature": 0.6, "logit_bias": {3: 5.0}},
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stop_below", [0.0, 0.1])
def test_chains_of_one_call_are_those_of_many(tmp_path: Path, dtype: Any, stop_below: float) -> None:
    """Greedy and sampled requests side by side, which stop at different depths; in a cache with room for all, and in
    one that is too small for all drafts."""
    folder = str(write_policy(tmp_path, policy(0, TINY_LLAMA, 8), TINY_LLAMA))
    for memory in ("4MiB", "512KiB"):
        drafter = Twice(stop_below)
        config = EngineConfig(
            model=folder,
            dtype=dtype,
            kernels="native",
            kv_cache_memory=memory,
            speculation_policy="fixed",
            max_draft_tokens=5,
            pipeline="off",
        )
        local = LocalEngine(config, [drafter])
        for seed, parameters in enumerate(PARAMETERS):
            params = SamplingParams(max_tokens=20 + seed, seed=seed, **parameters)
            local.submit([1 + seed, *range(seed, 40, 3)], params)
        local.finish()
        local.close()
        found = {wanted - length for length, wanted in drafter.lengths}
        assert len(drafter.lengths) > 50 and 0 in found and (len(found) > 2 or not stop_below)
