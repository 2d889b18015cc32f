"""A fingerprint changes with what a head depends on, and with nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream.drafter.registry import fingerprint
from slipstream.drafter.registry.fingerprint import served_fingerprint, target_fingerprint
from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError


def of(folder: Path, lineage: str = "") -> str:
    return target_fingerprint(open_checkpoint(folder), lineage)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes, indent=1))


def nudge(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][-1] += 0.5
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda folder: nudge(folder, "model.embed_tokens.weight"), True),
        (lambda folder: nudge(folder, "lm_head.weight"), True),
        (lambda folder: nudge(folder, "model.norm.weight"), False),
        (lambda folder: (folder / "tokenizer.json").write_text('{"tokens": ["a"]}'), True),
        (lambda folder: (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}'), False),
        (lambda folder: edit_config(folder, rope_theta=5e5), True),
        (lambda folder: edit_config(folder, intermediate_size=48), True),
        (lambda folder: edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e4}), False),
        (lambda folder: edit_config(folder, transformers_version="9.9", use_cache=False), False),
    ],
)
def test_what_it_depends_on(target: Path, change: Callable[[Path], None], differs: bool) -> None:
    before = of(target)
    change(target)
    assert (of(target) != before) == differs


def test_what_numbers_are_quantised_to_makes_another_model(target: Path) -> None:
    """But for a lineage, which stands for whatever serves."""
    found = {served_fingerprint(EngineConfig(model=str(target), quantize=bits)) for bits in ("none", "q8", "q4")}
    assert len(found) == 3 and of(target) in found
    lineage = {
        served_fingerprint(EngineConfig(model=str(target), quantize=bits, target_lineage="run 7"))
        for bits in ("none", "q4")
    }
    assert lineage == {of(target, "run 7")}


def test_a_lineage_stands_for_the_weights(target: Path) -> None:
    before = of(target, "run 7")
    assert before != of(target)
    assert before != of(target, "run 8")
    nudge(target, "model.embed_tokens.weight")
    assert of(target, "run 7") == before
    edit_config(target, rope_theta=5e5)
    assert of(target, "run 7") != before


def test_large_tensors_are_sampled_from_end_to_end(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WHOLE_BYTES", 1000), ("SAMPLES", 5), ("SAMPLE_BYTES", 16)):
        monkeypatch.setattr(fingerprint, name, value)
    sampled = of(target)
    tensors = load_file(target / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"].flatten()
    last = len(embedding) - 1
    for place, differs in ((0, True), (last, True), (len(embedding) // 2, True), (100, False)):
        changed = embedding.clone()
        changed[place] += 1
        save_file(tensors | {"model.embed_tokens.weight": changed.view(96, 64)}, target / "model.safetensors")
        assert (of(target) != sampled) == differs, place


def test_of_what_a_server_runs(target: Path) -> None:
    config = EngineConfig(model=str(target))
    assert served_fingerprint(config) == of(target)
    dummies = [EngineConfig(model=str(target), load_format="dummy", seed=seed) for seed in (0, 1)]
    assert len({served_fingerprint(each) for each in (config, *dummies)}) == 3
    # Where a lineage stands for the weights, it is nothing to it which ones they begin as.
    lineages = [replace(each, target_lineage="run 7") for each in (config, *dummies)]
    assert {served_fingerprint(each) for each in lineages} == {of(target, "run 7")}
    (target / "model.safetensors").unlink()
    served_fingerprint(dummies[0])
    with pytest.raises(ModelError, match="no weights"):
        served_fingerprint(config)


def test_a_model_without_known_embeddings_is_refused(target: Path) -> None:
    save_file({"wte": torch.zeros(2)}, target / "model.safetensors")
    with pytest.raises(ModelError, match="embed_tokens"):
        of(target)


def test_the_default_model() -> None:
    """Reads the tokenizer and the quantised embedding, not the 100 MB of the rest; and tells GGUF tensors apart."""
    checkpoint = open_checkpoint("default")
    began = time.process_time()
    found = target_fingerprint(checkpoint)
    assert time.process_time() - began < 2  # 0.05 s on a free core
    assert found == target_fingerprint(open_checkpoint("default"))
    stored = checkpoint.stored("model.embed_tokens.weight")
    assert stored.format == "Q8_0" and stored.data.shape == (49152, 576 * 34 // 32)
    with pytest.raises(KeyError):
        checkpoint.stored("lm_head.weight")
