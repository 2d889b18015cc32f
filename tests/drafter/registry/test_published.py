"""Heads in the forms in which others publish them: what is taken over, by import and by ``--drafter``, and what not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from slipstream.drafter.head import layout
from slipstream.drafter.head.layout import HeadConfig
from slipstream.drafter.registry.exchange import check_import, import_head
from slipstream.drafter.registry.registry import Registry
from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import decoder_config

Head = tuple[HeadConfig, dict[str, Tensor]]
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
HALF = torch.arange(48)
"""``d2t`` of a head that drafts every second token."""


@pytest.fixture
def head(make_head: Callable[[int], Head]) -> Head:
    config, tensors = make_head(1)
    return config, tensors | {"d2t": HALF, "t2d": torch.arange(96) % 2 == 0}


def publish(folder: Path, head: Head, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(head[0].to_json() | config))
    save_file(head[1], folder / "model.safetensors")
    return folder


def taken_over(folder: Path, registry: Registry, target: Path) -> list[dict[str, Tensor]]:
    """As ``--drafter`` reads it, and as it lies in a registry."""
    checkpoint = open_checkpoint(target)
    _, read = layout.read(folder, decoder_config(checkpoint.config))
    check_import(folder, checkpoint)
    return [read, registry.open_version(import_head(registry, folder, checkpoint).version, None)[1]]


def with_embeddings(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"embed_tokens.weight": torch.zeros(96, 64), "midlayer.self_attn.rotary_emb.inv_freq": HALF * 1.0}


FORMS: dict[str, Change] = {
    "as it is": lambda tensors: tensors,
    "without the mask, which SGLang and vLLM never read": lambda tensors: {
        k: v for k, v in tensors.items() if k != "t2d"
    },
    "smaller numbers": lambda tensors: tensors | {"d2t": HALF.int(), "t2d": tensors["t2d"].to(torch.uint8)},
    "a mask that is wrong": lambda tensors: tensors | {"t2d": torch.zeros(96, dtype=torch.bool)},
    "with what is the target's": with_embeddings,
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_head(form: str, head: Head, registry: Registry, target: Path, tmp_path: Path) -> None:
    config, tensors = head
    folder = publish(tmp_path / "head", (config, FORMS[form](tensors)))
    for read in taken_over(folder, registry, target):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_shards_and_links(head: Head, registry: Registry, target: Path, tmp_path: Path) -> None:
    """As the hub's cache holds them: links into another folder."""
    tensors = head[1]
    folder, blobs = publish(tmp_path / "head", head), tmp_path / "blobs"
    blobs.mkdir()
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for place in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == place}, blobs / place)
        (folder / place).symlink_to(blobs / place)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    for read in taken_over(folder, registry, target):
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    before = registry.list()
    for bad in ("../blobs/model-00001-of-00002.safetensors", "gone.safetensors"):
        index.write_text(json.dumps({"weight_map": places | {"fc.weight": bad}}))
        with pytest.raises(ModelError, match=f"the drafter in {folder} is damaged: the shard '{bad}'"):
            taken_over(folder, registry, target)
    assert registry.list() == before


@pytest.mark.parametrize(
    ("change", "said", "message"),
    [
        (lambda tensors: tensors | {"d2t": HALF.float()}, {}, "'d2t' holds numbers with a point"),
        (lambda tensors: tensors | {"d2t": HALF.bfloat16()}, {}, "'d2t' holds numbers with a point"),
        (lambda tensors: {k: v for k, v in tensors.items() if k != "d2t"}, {}, "lack 'd2t'"),
        (lambda tensors: tensors | {"midlayer.self_attn.q_proj.bias": HALF * 1.0}, {}, "not supported.*q_proj.bias"),
        (lambda tensors: tensors | {"midlayer.self_attn.q_norm.weight": HALF * 1.0}, {}, "not supported.*q_norm"),
        (lambda tensors: tensors | {"fc_norm.weight": HALF * 1.0}, {}, "not supported.*fc_norm"),
        (lambda tensors: tensors, {"hidden_act": "gelu"}, r"activation \(hidden_act\) is 'gelu'"),
        (lambda tensors: tensors, {"hidden_act": ["silu"]}, r"activation \(hidden_act\) is \['silu'\]"),
    ],
)
def test_variants_are_refused_by_name(
    change: Change, said: dict[str, Any], message: str, head: Head, registry: Registry, target: Path, tmp_path: Path
) -> None:
    """They would load, and draft badly."""
    config, tensors = head
    folder = publish(tmp_path / "head", (config, change(tensors)), **said)
    checkpoint = open_checkpoint(target)
    with pytest.raises(ModelError, match=message):
        layout.read(folder, decoder_config(checkpoint.config))
    with pytest.raises(ModelError, match=message):
        import_head(registry, folder, checkpoint)
    assert registry.list() == []


def test_a_pickle_of_something_else(head: Head, registry: Registry, target: Path, tmp_path: Path) -> None:
    folder = publish(tmp_path / "head", head)
    (folder / "model.safetensors").unlink()
    torch.save({"model": head[1]}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="does not hold tensors by their names"):
        import_head(registry, folder, open_checkpoint(target))
