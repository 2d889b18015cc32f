"""Small GGUF files, for tests of every room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from slipstream.engine.checkpoint.gguf_config import LAYER_TENSOR_NAMES, TENSOR_NAMES

PACKED_TYPES = {
    "attn_q": "Q4_1",
    "attn_k": "Q4_1",
    "attn_v": "Q8_0",
    "attn_output": "Q5_1",
    "ffn_gate": "Q4_0",
    "ffn_up": "Q4_0",
    "ffn_down": "Q5_0",
    "token_embd": "Q8_0",
}
"""Types of a small model's matrices, by their names in GGUF files: every form that there is for inputs that are no
multiple of 256, several in one matrix, and numbers where there is nothing."""


def write_gguf(
    path: Path, tensors: dict[str, Tensor], config: dict[str, Any], types: dict[str, str] = PACKED_TYPES
) -> Path:
    """A GGUF file of a Llama with these weights, quantised as told."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    for name, tensor in tensors.items():
        *outer, module, kind = name.removeprefix("model.").split(".")
        numbers, names = tensor.numpy(), LAYER_TENSOR_NAMES if outer else TENSOR_NAMES
        full = ".".join([*outer[2:], module])  # within a layer: self_attn.q_proj
        [own] = [theirs for theirs, ours in names.items() if ours.removeprefix("model.") == full]
        if own in ("attn_q", "attn_k"):  # such files have neighbouring rows rotate together
            pairs = numbers.reshape(heads if own == "attn_q" else kv_heads, 2, config["head_dim"] // 2, -1)
            numbers = pairs.swapaxes(1, 2).reshape(numbers.shape)
        place = f"blk.{outer[1]}.{own}.{kind}" if outer else f"{own}.{kind}"
        if numbers.ndim == 2 and own in types:
            to = gguf.GGMLQuantizationType[types[own]]
            writer.add_tensor(place, gguf.quants.quantize(numbers, to), raw_dtype=to)
        else:
            writer.add_tensor(place, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
