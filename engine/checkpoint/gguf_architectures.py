"""The architectures of GGUF files, each with the model type that it is of transformers: how tensors are called, what
the converter has changed of them, and what metadata says that only some models have.

Converters are llama.cpp's. Where a file is silent, it means what llama.cpp takes for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slipstream.engine.checkpoint.gguf_metadata import ModelMetadata
from slipstream.engine.errors import ModelError

More = Callable[[ModelMetadata, dict[str, Any]], dict[str, Any]]
"""Makes of metadata, and of the fields that all models have, those that only some have."""

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Those of a layer."""
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
"""Those of all experts lie in one tensor."""
MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}

WINDOW, PATTERN = ".attention.sliding_window", ".attention.sliding_window_pattern"
SOFTCAPS = (".attn_logit_softcapping", ".final_logit_softcapping")
MULTIPLIERS = {
    ".embedding_scale": "embedding_multiplier",
    ".residual_scale": "residual_multiplier",
    ".attention.scale": "attention_multiplier",
    ".logit_scale": "logits_scaling",
}
UNTRANSLATED = (
    *("expert_count", "logit_scale", "residual_scale", "embedding_scale", "attention.scale"),
    *("attention.temperature_scale", "attention.clamp_kqv", "expert_weights_scale", "expert_group_count"),
    *("attn_logit_softcapping", "final_logit_softcapping", "nextn_predict_layers", "leading_dense_block_count"),
)
"""Keys that change the computation, and mean something for those architectures only that name them."""


@dataclass(frozen=True)
class Architecture:
    model_type: str
    class_name: str
    """As transformers calls it."""
    names: Mapping[str, str]
    more: More = lambda meta, config: {}
    keys: tuple[str, ...] = ()
    """What it translates of UNTRANSLATED."""
    rotates_neighbours: bool = False
    """Whether rows 2 i and 2 i + 1 of a head's queries and keys rotate together."""
    raised_norms: bool = False
    """Whether 1 was added to the weights of norms."""
    partly_rotated: bool = False
    tables: tuple[str, ...] = field(default=("rope_freqs.weight",))
    """Tensors that are no parameters."""


def architecture(meta: ModelMetadata) -> Architecture | None:
    if meta.arch == "llama" and meta.get(".expert_count"):
        return MIXTRAL
    if meta.arch == "llama" and meta.get(WINDOW):
        return MISTRAL
    return ARCHITECTURES.get(meta.arch)


def _window(meta: ModelMetadata, config: dict[str, Any]) -> dict[str, Any]:
    return {"sliding_window": meta.count(WINDOW) if meta.get(WINDOW) else None}


def _experts(meta: ModelMetadata) -> dict[str, Any]:
    count, gate = meta.count(".expert_count"), meta.file.tensors.get("blk.0.ffn_gate_exps.weight")
    if gate is None or len(gate.shape) != 3 or gate.shape[0] != count:
        raise ModelError(
            f"{meta.file.path} states {count} experts, which lie in no tensor blk.0.ffn_gate_exps.weight of its own. "
            "Convert the model again, with a llama.cpp of 2025 or later."
        )
    return {
        "num_experts": count,
        "num_experts_per_tok": meta.count(".expert_used_count"),
        "moe_intermediate_size": meta.count(".expert_feed_forward_length", default=gate.shape[1]),
    }


def _mixtral(meta: ModelMetadata, config: dict[str, Any]) -> dict[str, Any]:
    experts = _experts(meta)
    return {
        "num_local_experts": experts["num_experts"],
        "num_experts_per_tok": experts["num_experts_per_tok"],
    } | _window(meta, config)


def _qwen3_moe(meta: ModelMetadata, config: dict[str, Any]) -> dict[str, Any]:
    return _experts(meta) | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _qwen2_moe(meta: ModelMetadata, config: dict[str, Any]) -> dict[str, Any]:
    shared = meta.file.tensors.get("blk.0.ffn_gate_shexp.weight")
    inner = meta.count(".expert_shared_feed_forward_length", default=None if shared is None else shared.shape[0])
    return _experts(meta) | {
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": inner,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": config["attention_bias"],
    }


def _gemma(meta: ModelMetadata, config: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(meta: ModelMetadata, config: dict[str, Any]) -> dict[str, Any]:
    return _gemma(meta, config) | {
        "query_pre_attn_scalar": _score_width(config, 46),
        "sliding_window": meta.count(WINDOW, default=4096),
        "layer_types": _kinds(meta, config, 2),
        "attn_logit_softcapping": meta.number(SOFTCAPS[0], default=50.0),
        "final_logit_softcapping": meta.number(SOFTCAPS[1], default=30.0),
    }


def _gemma3(meta: ModelMetadata, config: dict[str, Any]) -> dict[str, Any]:
    scaled = config["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": meta.number(".rope.freq_base_swa", default=10000.0)}
    return _gemma(meta, config) | {
        "query_pre_attn_scalar": _score_width(config, 62),
        "sliding_window": meta.count(WINDOW),
        "layer_types": _kinds(meta, config, 6),
        "rope_parameters": {"full_attention": scaled, "sliding_attention": local},
        "attn_logit_softcapping": meta.get(SOFTCAPS[0]) or None,
        "final_logit_softcapping": meta.get(SOFTCAPS[1]) or None,
    }


def _score_width(config: dict[str, Any], largest: int) -> int:
    """What scores are divided by the root of: files do not say it, and the largest model of a family, known by the
    number of its layers, has another one than the others."""
    is_largest = config["num_hidden_layers"] == largest
    return int(config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"])


def _kinds(meta: ModelMetadata, config: dict[str, Any], period: int) -> list[str]:
    """Kinds of layers, of which each last one of ``period`` sees all; or as the file says."""
    count, given = config["num_hidden_layers"], meta.get(PATTERN, period)
    if isinstance(given, list) and len(given) >= count:
        has_window = [bool(each) for each in given[:count]]
    else:
        period = meta.count(PATTERN, default=period)
        has_window = [(layer + 1) % period != 0 for layer in range(count)]
    return ["sliding_attention" if each else "full_attention" for each in has_window]


def _granite(meta: ModelMetadata, config: dict[str, Any]) -> dict[str, Any]:
    given = {name: meta.number(key, default=0.0) for key, name in MULTIPLIERS.items()}
    return {name: value for name, value in given.items() if value} | {"mlp_bias": config["mlp_bias"]}


QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM", NAMES)
QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM", NAMES | HEAD_NORMS)
QWEN3_MOE = Architecture(
    "qwen3_moe", "Qwen3MoeForCausalLM", NAMES | HEAD_NORMS | EXPERTS, _qwen3_moe, keys=("expert_count",)
)
MISTRAL = Architecture("mistral", "MistralForCausalLM", NAMES, _window, rotates_neighbours=True)
MIXTRAL = Architecture(
    *("mixtral", "MixtralForCausalLM", NAMES | MIXTRAL_EXPERTS, _mixtral),
    keys=("expert_count",),
    rotates_neighbours=True,
)
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", NAMES, rotates_neighbours=True),
    "qwen2": QWEN2,
    "qwen2vl": QWEN2,
    "qwen3": QWEN3,
    "qwen3vl": QWEN3,
    "qwen3moe": QWEN3_MOE,
    "qwen3vlmoe": QWEN3_MOE,
    "gemma3": Architecture(
        *("gemma3_text", "Gemma3ForCausalLM", NAMES | HEAD_NORMS | GEMMA_NORMS, _gemma3),
        keys=("attn_logit_softcapping", "final_logit_softcapping"),
        raised_norms=True,
    ),
    "gemma": Architecture("gemma", "GemmaForCausalLM", NAMES, _gemma, raised_norms=True),
    "gemma2": Architecture(
        *("gemma2", "Gemma2ForCausalLM", NAMES | GEMMA_NORMS, _gemma2),
        keys=("attn_logit_softcapping", "final_logit_softcapping"),
        raised_norms=True,
    ),
    "qwen2moe": Architecture(
        *("qwen2_moe", "Qwen2MoeForCausalLM", NAMES | EXPERTS | SHARED_EXPERT, _qwen2_moe), keys=("expert_count",)
    ),
    "phi3": Architecture(
        *("phi3", "Phi3ForCausalLM"),
        NAMES | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        _window,
        partly_rotated=True,
        tables=("rope_factors_short.weight", "rope_factors_long.weight"),
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", NAMES, rotates_neighbours=True),
    "granite": Architecture(
        *("granite", "GraniteForCausalLM", NAMES, _granite),
        keys=("embedding_scale", "residual_scale", "attention.scale", "logit_scale"),
        rotates_neighbours=True,
    ),
}
"""By the names in files."""
