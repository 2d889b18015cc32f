"""Files of EAGLE heads: read as they were written, and refused where they are damaged or of another kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slipstream.drafter.head import layout
from slipstream.drafter.head.layout import HeadConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import DecoderConfig, decoder_config
from slipstream.engine.testing.local import TINY_LLAMA

TARGET = TINY_LLAMA


def make(kind: str, target: DecoderConfig) -> tuple[HeadConfig, dict[str, Tensor]]:
    config = layout.config_for(target, 48)
    if kind == "eagle":
        config = replace(layout.config_for(target, 96, taps=(4,)), kind="eagle", fc_bias=True)
    return config, layout.random_tensors(config, 1)


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_files_round_trip(tmp_path: Path, kind: str) -> None:
    target = decoder_config(TARGET)
    config, tensors = make(kind, target)
    layout.write(tmp_path, config, tensors)
    again, read = layout.read(tmp_path, target)
    assert again == config
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor.bfloat16() if tensor.is_floating_point() else tensor)
    stored = json.loads((tmp_path / "config.json").read_text())
    expected = {"eagle3": ("LlamaForCausalLMEagle3", 48), "eagle": ("LlamaForCausalLMEagle", 96)}
    assert (stored["architectures"][0], stored["draft_vocab_size"]) == expected[kind]


def test_a_head_of_the_first_form_is_read(tmp_path: Path) -> None:
    """A pickle with embeddings of its own, beside a config.json that says little."""
    target = decoder_config(TARGET)
    config, tensors = make("eagle", target)
    torch.save(tensors | {"embed_tokens.weight": torch.zeros(96, 64)}, tmp_path / "pytorch_model.bin")
    said = TARGET | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(said))
    read_config, read = layout.read(tmp_path, target)
    assert replace(read_config, norm_eps=config.norm_eps, rope=config.rope) == config
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert {"fc.weight", "fc.bias", "layers.0.self_attn.q_proj.weight"} < read.keys()
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    for damaged in (b"not a pickle", b"", whole[: len(whole) // 2]):
        (tmp_path / "pytorch_model.bin").write_bytes(damaged)
        with pytest.raises(ModelError, match="damaged"):
            layout.read(tmp_path, target)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_scaled_positions_of_published_heads(kind: str) -> None:
    """As configurations state them from before there were rope_parameters."""
    said = layout.config_for(decoder_config(TARGET), 48).to_json() | {"rope_theta": 500000.0}
    del said["rope_parameters"]
    assert layout.parse_config(said, 4).rope == {"rope_type": "default", "rope_theta": 500000.0}
    scaled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rope = layout.parse_config(said | {"rope_scaling": scaled | {kind: "llama3"}}, 4).rope
    assert rope == scaled | {"rope_type": "llama3", "rope_theta": 500000.0}


def spoil_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return spoil


def spoil_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"), "damaged"),
        (spoil_config(architectures=["Medusa"]), "Medusa"),
        (spoil_config(hidden_size=32), "shape"),
        (spoil_tensors(lambda tensors: tensors.pop("fc.weight")), "fc.weight"),
        (spoil_tensors(lambda tensors: tensors.update(d2t=torch.full((48,), 60))), "d2t"),
    ],
)
def test_damaged_heads_are_refused(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    target = decoder_config(TARGET)
    layout.write(tmp_path, *make("eagle3", target))
    spoil(tmp_path)
    with pytest.raises(ModelError, match=message):
        layout.read(tmp_path, target)
