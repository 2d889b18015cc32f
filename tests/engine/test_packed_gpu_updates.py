"""Updates of packed weights where Triton's kernels run: as on a CPU, what is sent is packed again, the rest stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from slipstream.engine.config import EngineConfig
from slipstream.engine.models.decoder import DecoderWeights
from slipstream.engine.models.loader import load_model
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.models.weights import HostCopy, copy_missing
from slipstream.engine.testing.gguf import write_gguf
from slipstream.engine.testing.local import POLICY, policy
from slipstream.kernels.stored import Stored
from slipstream.kernels.triton import launch

pytestmark = pytest.mark.skipif(not launch.runs_on("cpu") and not torch.cuda.is_available(), reason="no Triton here")
Q, OUT = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
DOWN, EMBEDDING = "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"
STEPS = {Q: 15, OUT: 254, DOWN: 254, EMBEDDING: 254}
"""Into how many steps the form of a matrix parts a block: testing_gguf.PACKED_TYPES."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("packed") / "policy.gguf", policy(0), POLICY)


@pytest.fixture
def model(file: Path) -> CausalModel:
    known: dict[str, Any] = {"kv_cache_memory": "4MiB", "max_running": 8, "dtype": "bfloat16", "speculation": "off"}
    return load_model(EngineConfig(model=str(file), weights="packed", kernels="triton", **known)).model


def numbers(model: CausalModel) -> dict[str, Tensor]:
    return {name: model.weights.read(name, 0, shape[0]).float().cpu() for name, shape in model.weights.shapes.items()}


def sizes(model: CausalModel) -> list[int]:
    weights = model.weights
    assert isinstance(weights, DecoderWeights)
    return [part.num_bytes for part in (weights.embedding, weights.output, *weights.layers)]


def is_near(found: Tensor, sent: Tensor, steps: int) -> bool:
    """Half a step of each block of 32, and what scales of 16 bits and reading in bfloat16 lose."""
    blocks = sent.view(len(sent), -1, 32)
    step = (blocks.amax(-1) - blocks.amin(-1)).clamp(min=2 * blocks.abs().amax(-1) if steps == 254 else 0) / steps
    off = (found.view_as(blocks) - blocks).abs().amax(-1)
    if steps == 15:  # a few numbers are cut off, so that the others are nearer
        off = (found - sent).view(blocks.shape).square().mean(-1).sqrt() / 0.6
    return bool((off <= 0.51 * step + 0.005 * blocks.abs().amax(-1)).all())


def test_numbers_of_all_matrices_leave_them_their_size(model: CausalModel) -> None:
    before, trained = sizes(model), policy(1)
    weights = model.new_weights()
    for name, tensor in trained.items():
        weights.fill(name, tensor)
    weights.check_complete()
    model.use(weights)
    found = numbers(model)
    assert sizes(model) == before
    assert all(is_near(found[name], trained[name], steps) for name, steps in STEPS.items())


def test_what_is_not_sent_keeps_its_bits(model: CausalModel) -> None:
    before, old, sent = sizes(model), numbers(model), policy(1)[Q]
    for part in (slice(0, 64), slice(16, 21)):  # all of a matrix, and a few rows of it
        weights = model.new_weights()
        weights.fill(Q, sent[part], part.start)
        copy_missing(weights, model.weights)
        weights.check_complete()
        model.use(weights)
        found = numbers(model)
        assert sizes(model) == before
        assert [name for name in old if not torch.equal(found[name], old[name])] == [Q]
        assert is_near(found[Q], sent, STEPS[Q])


def test_a_matrix_with_a_lora_is_kept_as_numbers_and_the_others_packed(model: CausalModel) -> None:
    before, old = sizes(model), numbers(model)
    merged = old[DOWN] + 0.01
    weights = model.new_weights()
    weights.fill(DOWN, merged, 0, exact=True)
    copy_missing(weights, model.weights)
    model.use(weights)
    found = numbers(model)
    assert torch.equal(found[DOWN], merged.bfloat16().float())
    assert [name for name in old if not torch.equal(found[name], old[name])] == [DOWN]
    assert [size == earlier for size, earlier in zip(sizes(model), before, strict=True)] == [True, True, False, True]


def test_a_copy_on_the_host_keeps_blocks_and_gives_them_back(model: CausalModel) -> None:
    """As an engine that sleeps makes one."""
    before, old = sizes(model), numbers(model)
    copy = HostCopy(model.weights)
    assert isinstance(copy.tensors[Q], Stored) and copy.tensors[Q].data.nbytes < 64 * 64 * 2 / 2
    assert torch.equal(copy.read(Q, 3, 5).float().cpu(), old[Q][3:8])
    model.forget()
    weights = model.new_weights()
    for name, tensor in copy.tensors.items():
        weights.fill(name, tensor, exact=True)
    weights.check_complete()
    model.use(weights)
    found = numbers(model)
    assert sizes(model) == before
    assert all(torch.equal(found[name], old[name]) for name in old)
    later = model.new_weights()
    copy_missing(later, copy)  # what a LoRA is added to
    model.use(later)
    assert sizes(model) == before and all(torch.equal(tensor, old[name]) for name, tensor in numbers(model).items())
