"""Heads from and for elsewhere: what the loaders of SGLang and vLLM do with an exported one, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slipstream.drafter.choice import make_drafters
from slipstream.drafter.head import layout
from slipstream.drafter.registry.exchange import check_import, export_version, import_head
from slipstream.drafter.registry.fingerprint import target_fingerprint
from slipstream.drafter.registry.registry import Registry
from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import decoder_config
from slipstream.engine.testing.local import LocalEngine

VOCAB, DRAFT_VOCAB = 96, 48


@pytest.fixture
def version(registry: Registry, target: Path, make_head: Any) -> int:
    """A head whose draft vocabulary is every second token."""
    config, tensors = make_head(1)
    tensors["d2t"] = torch.arange(DRAFT_VOCAB)
    tensors["t2d"] = torch.arange(VOCAB) % 2 == 0
    fingerprint = target_fingerprint(open_checkpoint(target))
    return registry.add(config, tensors, target=fingerprint, origin="trained", gate={"accept_length": 1.8}).version


@pytest.fixture
def exported(registry: Registry, version: int, tmp_path: Path) -> Path:
    assert export_version(registry, version, tmp_path / "exported") == []
    return tmp_path / "exported"


class Module:
    """Named parameters of a loader's model; a fused one is filled part by part."""

    def __init__(self, config: dict[str, Any], layer: str, fc_inputs: int) -> None:
        hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
        self.shapes = {
            "model.fc.weight": (hidden, fc_inputs * hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (config["draft_vocab_size"], hidden),
            f"{layer}.self_attn.qkv_proj.weight": (q + 2 * kv, 2 * hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, q),
            f"{layer}.mlp.gate_up_proj.weight": (2 * inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.hidden_norm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
        self.parts = {
            ".qkv_proj": {"q_proj": (0, q), "k_proj": (q, kv), "v_proj": (q + kv, kv)},
            ".gate_up_proj": {"gate_proj": (0, inner), "up_proj": (inner, inner)},
        }
        self.filled = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in self.shapes.items()}

    def load(self, name: str, tensor: Tensor) -> None:
        for fused, parts in self.parts.items():
            for part, (start, rows) in parts.items():
                if f".{part}." in name:
                    place = self.filled[name.replace(f".{part}.", f"{fused}.")][start : start + rows]
                    assert place.shape == tensor.shape
                    place.fill_(True)
                    return
        assert self.shapes[name] == tuple(tensor.shape), name
        self.filled[name].fill_(True)

    def is_full(self) -> bool:
        return all(bool(filled.all()) for filled in self.filled.values())


def test_vllm_loads_an_exported_head(exported: Path) -> None:
    """Reads it as vllm/model_executor/models/llama_eagle3.py and v1/worker/gpu_model_runner.py of 0.32 do."""
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]  # a key of its model registry
    layers = config.get("eagle_aux_hidden_state_layer_ids")  # inputs of layers
    assert layers == [2, 4, 5]
    fused = config.get("num_aux_hidden_states") or len(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
    module = Module(config, "model.layers.0", fused)
    mapping = None
    for name, tensor in load_file(exported / "model.safetensors").items():
        if "t2d" in name:
            continue
        if "d2t" in name:
            mapping = tensor
        else:
            whole = name if "lm_head" in name else "model." + name
            module.load(whole.replace("midlayer.", "layers.0."), tensor)
    assert module.is_full()
    assert config["draft_vocab_size"] != config["vocab_size"]  # so it has room for the mapping, and needs one
    assert mapping is not None and mapping.shape == (DRAFT_VOCAB,) and mapping.dtype == torch.int64
    assert (torch.arange(DRAFT_VOCAB) + mapping).tolist() == list(range(0, VOCAB, 2))
    for switch in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias"):
        assert not config.get(switch, False)


def test_sglang_loads_an_exported_head(exported: Path) -> None:
    """Reads it as sglang/srt/models/llama_eagle3.py does, before and after its reading of layer numbers changed."""
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]  # its EntryClass
    assert config["eagle_config"].get("use_aux_hidden_state", True)
    layers = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert [layer + 1 for layer in layers] == [2, 4, 5]
    assert layers[0] == 1, "since May 2026 it adds one only if the first is 1"
    module = Module(config, "model.midlayer", 3)
    tensors = load_file(exported / "model.safetensors")
    for name, tensor in tensors.items():
        if "d2t" not in name and "t2d" not in name:
            module.load(name if name == "lm_head.weight" else f"model.{name}", tensor)
    assert module.is_full()
    assert not config["tie_word_embeddings"]  # or the head would be the embedding
    hot_token_id = tensors["d2t"] + torch.arange(tensors["d2t"].shape[0])
    assert hot_token_id.tolist() == list(range(0, VOCAB, 2))


def test_both_rely_on_these_fields(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["max_position_embeddings"] == 256, "that of the target: a shorter one ruins acceptance"
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 1)
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 10000.0
    stored = load_file(exported / "model.safetensors")
    assert {str(stored[name].dtype) for name in stored if name.endswith(".weight")} == {"torch.bfloat16"}


@pytest.mark.parametrize(("taps", "caution"), [((2, 4), "3 layers"), ((1, 2, 3), "numbers"), ((0, 4, 8), None)])
def test_what_sglang_cannot_load_is_said(
    registry: Registry, target: Path, tmp_path: Path, taps: tuple[int, ...], caution: str | None
) -> None:
    decoder = decoder_config(open_checkpoint(target).config)
    config = layout.config_for(decoder, DRAFT_VOCAB, taps)
    added = registry.add(config, layout.random_tensors(config, 0), target="A", origin="trained")
    cautions = export_version(registry, added.version, tmp_path / "exported")
    assert len(cautions) == (caution is not None)
    assert all(caution in each for each in cautions if caution)
    again, _ = layout.read(tmp_path / "exported", decoder)
    assert again.taps == taps


def test_a_round_trip(registry: Registry, version: int, exported: Path, target: Path) -> None:
    checkpoint = open_checkpoint(target)
    imported = import_head(registry, exported, checkpoint, route="acme")
    manifest = imported.manifest
    assert (imported.state, imported.route, manifest.origin, manifest.note) == (
        *("candidate", "acme", "imported"),
        "exported",
    )
    fingerprint = target_fingerprint(checkpoint)
    config, tensors = registry.open_version(version, fingerprint)
    again, read = registry.open_version(imported.version, fingerprint)
    assert again == config
    assert all(torch.equal(read[name], tensors[name]) for name in config.shapes)
    with pytest.raises(ModelError, match="not empty"):
        export_version(registry, version, exported)


def test_a_version_folder_keeps_its_story(registry: Registry, version: int, target: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(registry.path(version), tmp_path / "shipped")
    other = Registry(tmp_path / "other")
    imported = import_head(other, folder, open_checkpoint(target)).manifest
    assert (imported.origin, imported.gate, imported.version) == ("trained", {"accept_length": 1.8}, 1)
    with pytest.raises(ModelError, match="does not fit the model"):
        import_head(other, folder, open_checkpoint(target), lineage="another")
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match="is damaged: its SHA-256"):
        check_import(folder, open_checkpoint(target))


def edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("published", "taps"),
    [
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}}, (2, 4, 5)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 6]}}, (2, 4, 6)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "eagle_config": None}, (1, 3, 4)),
        ({"eagle_config": {}}, (2, 4, 5)),
    ],
)
def test_layer_numbers_of_published_heads(exported: Path, published: dict[str, Any], taps: tuple[int, ...]) -> None:
    config = json.loads((exported / "config.json").read_text())
    del config["eagle_aux_hidden_state_layer_ids"]
    assert layout.parse_config(config | published, num_layers=8).taps == taps


def test_a_published_head_with_a_short_context_gets_the_target_s(
    registry: Registry, exported: Path, target: Path
) -> None:
    edit(max_position_embeddings=64)(exported)
    tensors = load_file(exported / "model.safetensors")
    save_file(tensors | {"embed_tokens.weight": torch.zeros(VOCAB, 64)}, exported / "model.safetensors")
    imported = import_head(registry, exported, open_checkpoint(target))
    config, read = registry.open_version(imported.version, None)
    assert config.max_positions == 256
    assert "embed_tokens.weight" not in read, "the target's own is used"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (edit(norm_before_residual=True), "norm_before_residual"),
        (edit(fc_norm=True), "fc_norm"),
        (edit(num_hidden_layers=2), "2 layers"),
        (edit(vocab_size=97, t2d=None), "shape"),
        (edit(eagle_aux_hidden_state_layer_ids=[2, 4, 9]), "layer 9 of 8"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "damaged"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_heads_that_cannot_work_are_not_imported(
    registry: Registry, exported: Path, target: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(exported)
    before = registry.list()
    checkpoint = open_checkpoint(target)
    with pytest.raises(ModelError, match=message):  # which looks at a few small files only
        check_import(exported, checkpoint)
    with pytest.raises(ModelError, match=message):
        import_head(registry, exported, checkpoint)
    assert registry.list() == before


def engine(target: Path, drafter: Path, **fields: Any) -> LocalEngine:
    config = EngineConfig(model=str(target), drafter=str(drafter), speculation="head", kv_cache_memory="4MiB", **fields)
    return LocalEngine(config, make_drafters(config))


def test_a_server_takes_a_version_folder_of_its_model_only(
    registry: Registry, version: int, target: Path, tmp_path: Path
) -> None:
    folder = registry.path(version)
    engine(target, folder)
    twin = shutil.copytree(target, tmp_path / "twin")
    tensors = load_file(twin / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 1
    save_file(tensors, twin / "model.safetensors")
    with pytest.raises(ModelError, match=f"does not fit the model: .*{target_fingerprint(open_checkpoint(target))}"):
        engine(twin, folder)
    with pytest.raises(ModelError, match="does not fit"):
        engine(target, folder, load_format="dummy")
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated"):
        engine(target, folder)


def test_a_head_of_the_first_form_comes_and_goes_as_it_is(registry: Registry, target: Path, tmp_path: Path) -> None:
    decoder = decoder_config(open_checkpoint(target).config)
    last = decoder.shape.num_layers
    sizes = layout.config_for(decoder, decoder.shape.vocab_size, taps=(last,))
    config = dataclasses.replace(sizes, kind="eagle", fc_bias=True)
    tensors = layout.random_tensors(config, 0)
    layout.write(tmp_path / "published", config, tensors)
    added = import_head(registry, tmp_path / "published", open_checkpoint(target))
    assert export_version(registry, added.version, tmp_path / "exported") == []
    again, read = layout.read(tmp_path / "exported", decoder)
    assert again == config and again.taps == (last,)
    assert all(torch.equal(read[name], tensor.bfloat16()) for name, tensor in tensors.items())
