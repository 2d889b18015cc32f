"""Small GGUF files, for tests of every room: what llama.cpp's converter makes of models, by that project's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import gguf

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
EXPERT_TYPES = PACKED_TYPES | {"ffn_gate_exps": "Q4_0", "ffn_up_exps": "Q4_0", "ffn_down_exps": "Q8_0"}

PERMUTED, RAISED = ("llama", "smollm3", "granite"), ("gemma", "gemma2", "gemma3")
"""Architectures whose neighbouring rows rotate together, and those of which norms are 1 more."""
EXPERT = re.compile(r"(?P<before>.+\.experts)\.(?P<number>\d+)\.(?P<after>\w+)\.weight")
MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
COUNTS = {
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "sliding_window": "attention.sliding_window",
}


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    types: Mapping[str, str] = PACKED_TYPES,
    arch: str = "llama",
    split: int = 0,
    raw: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """A GGUF file of a model with these weights and this configuration of Hugging Face's, quantised as told.

    ``split``: in several files, of so many tensors each, of which the first is answered. ``raw``: matrices of types
    that nothing here quantises to, which get bytes of zeros. ``more``: metadata of the architecture.
    """
    import gguf

    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    _add_metadata(writer, config)
    for key, value in (more or {}).items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"{arch}.{key}", value)
    kinds = {str(kind): number for number, kind in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH(kinds[arch]), config["num_hidden_layers"])
    for name, tensor in _stacked(tensors).items():
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert place is not None, name
        module, numbers = place.split(".")[-2], tensor.float()
        if arch in PERMUTED and module in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if module == "attn_q" else "num_key_value_heads"]
            numbers = numbers.view(heads, 2, -1, *numbers.shape[1:]).swapaxes(1, 2).reshape(numbers.shape)
        if arch in RAISED and name.endswith("norm.weight"):
            numbers = numbers + 1
        data = numbers.squeeze(0).contiguous().numpy()
        if data.ndim > 1 and module in types:
            to = gguf.GGMLQuantizationType[types[module]]
            writer.add_tensor(place, gguf.quants.quantize(data, to), raw_dtype=to)
        elif data.ndim > 1 and raw and module in raw:
            to = gguf.GGMLQuantizationType[raw[module]]
            shape = gguf.quant_shape_to_byte_shape(data.shape, to)
            writer.add_tensor(place, np.zeros(shape, np.uint8), raw_dtype=to)
        else:
            writer.add_tensor(place, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if split else path


def _add_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    if size := config.get("head_dim"):
        writer.add_key_length(size)
        writer.add_value_length(size)
    for name, key in COUNTS.items():
        if value := config.get(name):
            writer.add_uint32(f"{writer.arch}.{key}", value)
    for name, key in MULTIPLIERS.items():
        if value := config.get(name):
            writer.add_float32(f"{writer.arch}.{key}", value)
    rope = config.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    writer.add_rope_freq_base(whole.get("rope_theta", 10000.0))
    if whole.get("rope_type") == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_float32(f"{writer.arch}.rope.scaling.factor", whole["factor"])
    if "partial_rotary_factor" in rope:
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        writer.add_rope_dimension_count(int(size * rope["partial_rotary_factor"]))
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        for which in ("short", "long"):
            factors = torch.tensor(rope[f"{which}_factor"]).float().numpy()
            writer.add_tensor(f"rope_factors_{which}.weight", factors)


def _stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With one tensor for the same matrix of all experts."""
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if (part := EXPERT.fullmatch(name)) is None:
            found[name] = tensor
        else:
            experts.setdefault(f"{part['before']}.{part['after']}.weight", {})[int(part["number"])] = tensor
    return found | {name: torch.stack([own[at] for at in sorted(own)]) for name, own in experts.items()}
