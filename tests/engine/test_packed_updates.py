"""Updates of weights that are packed: what is sent is packed again, what is not stays as it was to the bit."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.decoder import DecoderWeights
from slipstream.engine.models.loader import load_model
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.models.weights import copy_missing
from slipstream.engine.operations import (
    BeginTargetUpdate,
    FillTarget,
    FinishTargetUpdate,
    Operation,
    ReadTensor,
    ReleaseMemory,
    ResumeMemory,
)
from slipstream.engine.testing.gguf import write_gguf
from slipstream.engine.testing.local import POLICY, LocalEngine, policy
from slipstream.kernels.native.library import isa

pytestmark = pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPTS = [[1, 2, 3], list(range(20)), [7] * 40]
NORM = "model.norm.weight"
Q, K, V, OUT = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo")
GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
EMBEDDING = "model.embed_tokens.weight"
STEPS = {Q: 15, K: 15, V: 254, OUT: 254, GATE: 8, UP: 8, DOWN: 254, EMBEDDING: 254}
"""Into how many steps the form of a matrix parts a block: testing_gguf.PACKED_TYPES."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("packed") / "policy.gguf", policy(0), POLICY)


def options(file: Path, **fields: Any) -> EngineConfig:
    known = {"kv_cache_memory": "4MiB", "max_running": 8, "dtype": "bfloat16", "threads": 1, "speculation": "off"}
    return EngineConfig(model=str(file), weights="packed", **(known | fields))


def said(local: LocalEngine) -> list[list[int]]:
    return [done.tokens for done in local.generate(PROMPTS, GREEDY)]


def served(local: LocalEngine) -> dict[str, Tensor]:
    found = {}
    for name in policy(0):
        rows = local.operate(ReadTensor(name, rows=10_000))
        found[name] = torch.from_numpy(np.frombuffer(rows.values, np.float32).copy()).view(rows.shape)
    return found


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]


def update(version: int, tensors: dict[str, Tensor], **finish: Any) -> list[Operation[Any]]:
    parts = BeginTargetUpdate(version, "recompute"), FillTarget(version, save(tensors))
    return [*parts, FinishTargetUpdate(version, **finish)]


def is_near(found: Tensor, sent: Tensor, steps: int) -> bool:
    """Half a step of its block away at most, but for what scales in 16 bits are off; with 15 steps, on average."""
    blocks = sent.view(len(sent), -1, 32)
    width = blocks.amax(-1, True) - blocks.amin(-1, True)
    step = (2 * blocks.abs().amax(-1, True) if steps in (8, 254) else width) / (2 * steps if steps == 8 else steps)
    off = (found - sent).view(blocks.shape).abs()
    if steps == 15:  # a few numbers are cut off, so that the others are nearer
        return bool((off.square().mean(-1, True).sqrt() <= 0.3 * step).all())
    # Of 16 steps that begin with the largest number, the other end may be cut off by a whole one.
    return bool((off <= step * (1.01 if steps == 8 else 0.51) + 1e-3 * blocks.abs().amax(-1, True)).all())


def sizes(model: CausalModel) -> list[int]:
    weights = model.weights
    assert isinstance(weights, DecoderWeights)
    return [part.num_bytes for part in (weights.embedding, weights.output, *weights.layers)]


@pytest.mark.parametrize("sent", [(NORM,), (Q,), (V,), (UP,), (K, DOWN), (EMBEDDING,)], ids=str)
def test_what_is_not_sent_keeps_its_bits_and_what_is_its_form(file: Path, sent: tuple[str, ...]) -> None:
    model = load_model(options(file)).model
    before = sizes(model)
    held = {name: model.weights.read(name, 0, shape[0]) for name, shape in model.weights.shapes.items()}
    trained = {name: policy(1)[name] for name in sent}
    weights = model.new_weights()
    for name, tensor in trained.items():
        for first in range(0, len(tensor), 24):  # rows that are no whole panels
            weights.fill(name, tensor[first : first + 24], first)
    copy_missing(weights, model.weights)
    model.use(weights)
    assert sizes(model) == before
    for name, tensor in held.items():
        found = model.weights.read(name, 0, len(tensor))
        if name not in sent or name == NORM:
            assert torch.equal(found, trained[name] if name in sent else tensor), name
        else:
            assert is_near(found, trained[name], STEPS[name]) and not torch.equal(found, tensor), name


def test_an_engine_goes_on_with_packed_weights(file: Path) -> None:
    local = LocalEngine(options(file))
    before, answers = served(local), said(local)
    local.operate(*update(1, {NORM: before[NORM]}, keep_rest=True))
    assert (changed(before, served(local)), said(local)) == ([], answers)
    local.operate(*update(2, {K: policy(1)[K]}, keep_rest=True))
    assert changed(before, served(local)) == [K]
    local.operate(*update(3, {name: before[name] for name in (K, GATE, EMBEDDING)}, keep_rest=True))
    assert (changed(before, served(local)), said(local)) == ([], answers), "what a form has exactly is left so"
    local.close()


def test_all_that_is_sent_is_packed_again_in_the_memory_that_the_model_had(file: Path) -> None:
    model = load_model(options(file)).model
    before, trained = sizes(model), policy(1)
    weights = model.new_weights()
    for name, tensor in trained.items():
        weights.fill(name, tensor)
    weights.check_complete()
    model.use(weights)
    assert sizes(model) == before
    assert all(is_near(weights.read(name, 0, len(trained[name])), trained[name], STEPS[name]) for name in STEPS)


def lora(scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    module = "base_model.model.model.layers.0.self_attn.k_proj"
    down, up = torch.randn(4, 64, generator=generator), scale * torch.randn(32, 4, generator=generator)
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


def test_a_lora_changes_numbers_and_leaves_the_rest_packed(file: Path) -> None:
    """Packed again, a LoRA whose numbers are smaller than half a step would be gone."""
    local = LocalEngine(options(file, dtype="float32"))
    before, small = served(local), lora(1e-4)
    down, up = small.values()
    local.operate(*update(1, small, lora_scale=0.5))
    after = served(local)
    assert changed(before, after) == [K]
    assert torch.allclose(after[K], before[K] + 0.5 * up @ down, rtol=0, atol=1e-6)
    local.operate(*update(2, {NORM: before[NORM]}, keep_rest=True))
    assert changed(after, served(local)) == [], "the matrix that has the LoRA stays as it serves, too"
    local.operate(*update(3, {K: before[K]}, keep_rest=True))
    assert changed(before, served(local)) == [], "packed again"
    local.close()


def test_matrices_beside_a_lora_stay_packed(file: Path) -> None:
    model = load_model(options(file)).model
    weights = model.new_weights()
    before = sizes(model)
    weights.fill(DOWN, model.weights.read(DOWN, 0, 64), 0, exact=True)
    copy_missing(weights, model.weights)
    model.use(weights)
    assert [size == old for size, old in zip(sizes(model), before, strict=True)] == [True, True, False, True]


@pytest.mark.parametrize("rows", [(0, 1, 2, 3), (3, 1, 2, 0)], ids=str)
def test_checksums_are_those_of_what_was_sent(file: Path, rows: tuple[int, ...]) -> None:
    """In parts and in any order, as for weights that are not packed."""
    local = LocalEngine(options(file))
    sent = policy(1)[GATE]
    checksum = hashlib.sha256(sent.bfloat16().view(torch.uint8).numpy().tobytes()).hexdigest()
    for version, expected in ((1, checksum), (2, "0" * 64)):
        parts: list[Operation[Any]] = [BeginTargetUpdate(version, "recompute")]
        parts += [
            FillTarget(version, save({GATE: sent[24 * at : 24 * at + 24].clone()}), {GATE: 24 * at}) for at in rows
        ]
        finish = FinishTargetUpdate(version, keep_rest=True, checksums={GATE: expected})
        if expected == checksum:
            local.operate(*parts, finish)
        else:
            with pytest.raises(ModelError, match="checksums"):
                local.operate(*parts, finish)
    local.close()


def test_an_update_during_a_sleep_is_packed_and_so_are_files_afterwards(file: Path) -> None:
    local = LocalEngine(options(file))
    before, trained = served(local), policy(1)
    local.operate(ReleaseMemory(("weights", "kv_cache"), keep_weights=False))
    local.operate(*update(1, trained))
    local.operate(ResumeMemory(("weights", "kv_cache")))
    after = served(local)
    assert all(is_near(after[name], trained[name], STEPS[name]) for name in STEPS)
    assert all(math.isfinite(float(tensor.sum())) for tensor in after.values())
    local.operate(ReleaseMemory(("weights", "kv_cache"), keep_weights=False))
    local.operate(ResumeMemory(("weights", "kv_cache")))
    assert changed(before, served(local)) == []
    local.close()
