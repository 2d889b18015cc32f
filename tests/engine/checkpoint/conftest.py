"""Tiny models, written the way llama.cpp's converter and transformers write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from slipstream.engine.checkpoint.dummy import dummy_tensors

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

WriteGGUF = Callable[..., Path]
Configure = Callable[[gguf.GGUFWriter], None]


def tiny_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 40,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    } | changes


def random_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every parameter with values of its own, norms and biases included."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in dummy_tensors(config, 0)}


def to_gguf(name: str, tensor: torch.Tensor, config: dict[str, Any], arch: str) -> tuple[str, np.ndarray]:
    """Name and data as llama.cpp's convert_hf_to_gguf.py writes them."""
    module, kind = name.rsplit(".", 1)
    data = tensor.numpy()
    if module in TOP_NAMES:
        return f"{TOP_NAMES[module]}.{kind}", data
    _, _, layer, part = module.split(".", 3)
    if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config["num_attention_heads" if part.endswith("q_proj") else "num_key_value_heads"]
        halves = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
        data = halves.swapaxes(1, 2).reshape(data.shape)
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}", data


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGGUF:
    def write(
        config: dict[str, Any],
        tensors: dict[str, torch.Tensor] | None = None,
        *,
        arch: str | None = None,
        configure: Configure | None = None,
        extra: dict[str, np.ndarray] | None = None,
        name: str = "tiny.gguf",
    ) -> Path:
        arch = arch or config["model_type"]
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, arch)
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        if configure is not None:
            configure(writer)
        for hf_name, tensor in (random_tensors(config) if tensors is None else tensors).items():
            writer.add_tensor(*to_gguf(hf_name, tensor, config, arch))
        for extra_name, data in (extra or {}).items():
            writer.add_tensor(extra_name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """A Hugging Face folder; with ``shards`` the weights are spread over so many files."""

    def write(config: dict[str, Any], shards: int = 1) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = random_tensors(config)
        if shards == 1:
            save_file(tensors, folder / "model.safetensors")
            return folder
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            part = dict(list(tensors.items())[shard::shards])
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return write


@pytest.fixture
def tiny() -> Callable[..., dict[str, Any]]:
    return tiny_config


@pytest.fixture
def parameters() -> Callable[[dict[str, Any]], dict[str, torch.Tensor]]:
    return random_tensors
