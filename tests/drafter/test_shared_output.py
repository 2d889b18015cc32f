"""Versions of a head that draft with the same rows of the target's output matrix share one copy of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from slipstream.drafter.head import layout
from slipstream.drafter.head.drafter import FirstHead, HeadDrafter
from slipstream.drafter.head.layout import HeadConfig
from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.config import DecoderConfig, decoder_config
from slipstream.engine.operations import SwapDrafter
from slipstream.engine.testing.local import TINY_LLAMA, LocalEngine
from slipstream.kernels.native.library import isa

# Small weights and tied embeddings: it repeats the last token, which its own last layer sees coming.
TARGET = TINY_LLAMA | {"tie_word_embeddings": True}
KERNELS = ["torch", *(["native"] if isa() else [])]


@pytest.mark.parametrize("kernels", KERNELS)
def test_versions_share_copies_of_the_targets_rows_until_one_has_others(tmp_path: Path, kernels: str) -> None:
    """Nothing is copied twice, and what one version gives up is no memory that another still reads."""
    (tmp_path / "config.json").write_text(json.dumps(TARGET))
    tensors = dict(dummy_tensors(TARGET, 0))
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = layout.config_for(decoder_config(TARGET), 96)
    good, *random = (tmp_path / name for name in ("good", "random", "random too"))
    layout.write(good, sizes, layout.from_target(sizes, layout.last_layer(tensors.items(), 4), range(96)))
    for seed, folder in enumerate(random):
        layout.write(folder, sizes, layout.random_tensors(sizes, seed))

    def read(folder: Path, target: DecoderConfig) -> tuple[HeadConfig, dict[str, Tensor]]:
        """As of a version that was trained here: its output matrix is the target's."""
        config, found = layout.read(folder, target)
        if folder == good:
            del found["lm_head.weight"]
        return config, found

    drafter = HeadDrafter(lambda target: FirstHead(*read(good, target)), read=read)
    policy = {"speculation_policy": "fixed", "max_draft_tokens": 3}
    config = EngineConfig(model=str(tmp_path), dtype="float32", kernels=kernels, kv_cache_memory="16MiB", **policy)
    local = LocalEngine(config, [drafter])
    first = drafter._held[""].weights
    local.operate(SwapDrafter(2, "", str(good)))
    second = drafter._held[""].weights
    assert second is not first and second.output is first.output
    local.operate(SwapDrafter(3, "", str(random[0])))
    assert drafter._held[""].weights is first, "memory of the version that was not held for longest"
    for version, folder, right in ((2, good, True), (4, random[1], False), (5, good, True)):
        local.operate(SwapDrafter(version, "", str(folder)))
        [answer] = local.generate([[1, 2, 3]], SamplingParams(max_tokens=60, temperature=0.0))
        drafted, accepted = (
            sum(getattr(delta, name) for delta in answer.deltas) for name in ("num_drafted", "num_accepted")
        )
        assert drafted and (accepted > 0.9 * drafted if right else accepted < 0.3 * drafted)
