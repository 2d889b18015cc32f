"""What a decoder looks like, read from a Hugging Face config.json."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from slipstream.engine.checkpoint.shapes import FAMILIES, is_tied, num_experts, parameter_shapes
from slipstream.engine.checkpoint.text_part import PART_OF
from slipstream.engine.errors import ModelError
from slipstream.engine.models.rope import FROM_ORIGINAL, context_length, is_nested, rope_parameters, switch_length

if TYPE_CHECKING:
    from torch import Tensor

    from slipstream.kernels.compute import Formats, LayerShape
    from slipstream.kernels.kv_cache import CacheShape


GEMMA_THETA, GEMMA_LOCAL_THETA, GEMMA_PATTERN = 1_000_000.0, 10_000.0, 6
"""What Gemma 3 has where config.json is silent: bases of rotary positions, and every how many layers one sees all."""
USUAL_WINDOW, FULL_LAYERS = 4096, 28
"""What models with sliding windows have where config.json is silent: their size, and how many layers of Qwen's dense
models see all before those that do not."""
NOT_OF_GEMMA = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
"""Settings that published models of Gemma 3 leave empty; with them, transformers runs a model."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the KV cache and the scheduler need to know of any model."""

    model_type: str
    vocab_size: int
    num_layers: int
    kv_heads: int
    head_dim: int
    max_positions: int
    """The longest sequence, scaling of rotary positions included."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The Llama family: pre-norm decoder, rotary positions, grouped-query attention, gated MLP."""

    shape: ModelShape
    hidden: int
    intermediate: int
    heads: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    """Sliding window per layer; 0 attends to everything."""
    rope: dict[str, Any]
    """Rotary parameters as in config.json: rope_type, rope_theta and what the type needs."""
    parameters: dict[str, tuple[int, ...]]
    """Hugging Face name and shape of every parameter."""
    window_rope: dict[str, Any] | None = None
    """Rotary parameters of layers with a window, where they have others."""
    sees: bool = False
    """Whether it is the decoder of a model that sees, whose other tensors are left."""
    more: dict[str, Any] = field(default_factory=dict)
    """What else of ``LayerShape`` is not as in Llama's layers, by the names there; a mixture as its fields."""

    def differences(self, other: DecoderConfig) -> list[tuple[str, Any]]:
        """What is not the same in another one, and matters to what weights mean: names of fields, and its values."""
        ours, theirs = (
            {"vocab_size": each.shape.vocab_size, "head_dim": each.shape.head_dim}
            | {"kv_heads": each.shape.kv_heads, "layers": each.shape.num_layers}
            | {one.name: getattr(each, one.name) for one in fields(each) if one.name not in ("shape", "sees")}
            for each in (self, other)
        )
        return [(name, theirs[name]) for name in ours if ours[name] != theirs[name]]

    @property
    def layer(self) -> LayerShape:
        """What all of its layers look like."""
        from slipstream.kernels.compute import LayerShape, Mixture  # not above: it imports torch

        mixture = self.more.get("mixture")
        more = self.more | {"mixture": None if mixture is None else Mixture(**mixture)}
        return LayerShape(
            hidden=self.hidden,
            intermediate=self.intermediate,
            heads=self.heads,
            kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            norm_eps=self.norm_eps,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            mlp_bias=self.mlp_bias,
            qk_norm=self.qk_norm,
            **more,
        )


def cache_shape(shape: ModelShape, block_size: int, formats: Formats) -> CacheShape:
    """What the model's cache keeps, in these formats."""
    from slipstream.kernels.kv_cache import CacheShape  # not above: it imports torch

    return CacheShape(shape.num_layers, block_size, shape.kv_heads, shape.head_dim, formats.kv, formats.compute)


def model_shape(config: dict[str, Any]) -> ModelShape:
    """Raises ModelError naming the missing key."""
    hidden, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    check_heads(heads, kv_heads)
    return ModelShape(
        model_type=need(config, "model_type"),
        vocab_size=need(config, "vocab_size"),
        num_layers=need(config, "num_hidden_layers"),
        kv_heads=kv_heads,
        head_dim=config.get("head_dim") or hidden // heads,
        max_positions=context_length(config, stated_positions(config)),
    )


def check_heads(heads: int, kv_heads: int) -> None:
    """Raises ModelError where heads have no keys and values of their own, or share none evenly: kernels read memory by
    these numbers."""
    if heads % kv_heads:
        raise ModelError(f"{heads} attention heads cannot share {kv_heads} heads of keys and values evenly")


def is_own(config: dict[str, Any]) -> bool:
    """Whether the decoders here run this model, not transformers, which does rotary positions that depend on length."""
    family = need(config, "model_type")
    if family == "qwen3_moe" and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        return False  # some of its layers have no mixture
    if family == "gemma3_text" and any(config.get(name) for name in NOT_OF_GEMMA):
        return False
    if family not in FAMILIES or switch_length(config, stated_positions(config)):
        return False
    key, usual = _activation(family)
    return bool(config.get(key, usual) == usual)


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    """Translates config.json of one of FAMILIES; raises ModelError for what these implementations do not cover."""
    family = need(config, "model_type")
    assert family in FAMILIES
    shape = model_shape(config)
    key, usual = _activation(family)
    if (activation := config.get(key, usual)) != usual:
        raise ModelError(f"{family} with {key} {activation!r} is not supported; these models use {usual!r}")
    parameters = dict(parameter_shapes(config))
    first = "model.layers.0."
    return DecoderConfig(
        shape=shape,
        hidden=need(config, "hidden_size"),
        intermediate=need(config, "intermediate_size"),
        heads=need(config, "num_attention_heads"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=is_tied(config),
        qkv_bias=first + "self_attn.q_proj.bias" in parameters,
        out_bias=first + "self_attn.o_proj.bias" in parameters,
        mlp_bias=first + "mlp.up_proj.bias" in parameters,
        qk_norm=first + "self_attn.q_norm.weight" in parameters,
        windows=_windows(config, shape.num_layers),
        rope=_rope(config),
        parameters=parameters,
        window_rope=_window_rope(config),
        sees=PART_OF in config,
        more=_more(config),
    )


def _activation(family: str) -> tuple[str, str]:
    """Where configurations name the activation, and the one that is computed here."""
    return ("hidden_activation", "gelu_pytorch_tanh") if family == "gemma3_text" else ("hidden_act", "silu")


def _more(config: dict[str, Any]) -> dict[str, Any]:
    if config["model_type"] == "qwen3_moe":
        mixture = {
            "experts": num_experts(config),
            "top": config.get("num_experts_per_tok", 8),
            "intermediate": need(config, "moe_intermediate_size"),
            "renormalize": bool(config.get("norm_topk_prob", False)),
        }
        return {"mixture": mixture}
    if config["model_type"] == "gemma3_text":
        return {
            "is_gemma": True,
            "score_scale": float(config.get("query_pre_attn_scalar", 256) ** -0.5),
            "embedding_scale": float(need(config, "hidden_size") ** 0.5),
        }
    return {}


def window_rope_tables(config: DecoderConfig, length: int) -> tuple[Tensor, Tensor] | None:
    """Those of layers with a window, where they have others."""
    if config.window_rope is None:
        return None
    return rope_tables(replace(config, rope=config.window_rope), length)


def rope_tables(config: DecoderConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each [length, head_dim / 2] float32, scaling of long-context models included."""
    import torch  # not above: configurations are also read where there is no need of it
    from huggingface_hub.errors import StrictDataclassError

    head_dim, rope = config.shape.head_dim, config.rope
    try:
        if rope["rope_type"] == "default":
            theta = torch.tensor(float(rope["rope_theta"]))
            inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
            factor = 1.0
        else:
            inverse, factor = _scaled_frequencies(config, length)
    except (LookupError, TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        raise ModelError(f"the rotary parameters {rope} mean nothing: {error}") from error
    if 2 * len(inverse) != head_dim or not inverse.isfinite().all():  # kernels read as many as a head is wide
        raise ModelError(f"the rotary parameters {rope} are none for all of a head of size {head_dim}")
    angles = torch.outer(torch.arange(length).float(), inverse)
    return angles.cos() * factor, angles.sin() * factor


def _scaled_frequencies(config: DecoderConfig, length: int) -> tuple[Tensor, float]:
    import torch
    from transformers import PretrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope["rope_type"]
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ModelError(f"rope_type {kind!r} is unknown; transformers knows {sorted(ROPE_INIT_FUNCTIONS)}")
    standard = PretrainedConfig(
        hidden_size=config.hidden,
        num_attention_heads=config.heads,
        head_dim=config.shape.head_dim,
        max_position_embeddings=config.shape.max_positions,
        rope_parameters=config.rope,
    )
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](standard, torch.device("cpu"), seq_len=length)
    return inverse.float(), float(factor)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters, with the original length where the kind needs it and the file leaves it out."""
    rope = rope_parameters(config)
    if config["model_type"] == "gemma3_text":  # by kinds of layers, or in the fields from before there were such
        rope = _of_kind(config, "full_attention", config.get("rope_theta", GEMMA_THETA))
    elif is_nested(rope):
        raise ModelError(f"config.json has rotary parameters by kinds of layers, and all layers have the same: {rope}")
    if rope["rope_type"] in FROM_ORIGINAL:
        rope.setdefault("original_max_position_embeddings", stated_positions(config))
    return rope


def _window_rope(config: dict[str, Any]) -> dict[str, Any] | None:
    if config["model_type"] != "gemma3_text":
        return None
    return _of_kind(config, "sliding_attention", config.get("rope_local_base_freq", GEMMA_LOCAL_THETA))


def _of_kind(config: dict[str, Any], kind: str, theta: float) -> dict[str, Any]:
    given = config.get("rope_parameters") or {}
    rope = dict(given.get(kind) or {})
    if kind == "full_attention":
        rope |= config.get("rope_scaling") or {}
    named = rope.pop("type", None)
    return {"rope_type": named or "default", "rope_theta": theta} | rope


def stated_positions(config: dict[str, Any]) -> int:
    """max_position_embeddings, which scaling of rotary positions may extend."""
    return int(config.get("max_position_embeddings") or 2048)


def _windows(config: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    kind, window = config["model_type"], config.get("sliding_window", USUAL_WINDOW) or 0
    if kind == "gemma3_text":
        pattern = config.get("sliding_window_pattern") or GEMMA_PATTERN
        sees_all = [(layer + 1) % pattern == 0 for layer in range(num_layers)]
        kinds = config.get("layer_types")
        if kinds:
            sees_all = [kind == "full_attention" for kind in kinds]
        return tuple(0 if each else window for each in sees_all)
    if kind == "llama" or not config.get("use_sliding_window", kind == "mistral"):
        return (0,) * num_layers
    if kind in ("mistral", "qwen3_moe"):  # in all layers, whatever else is said of them
        return (window,) * num_layers
    if kinds := config.get("layer_types"):
        return tuple(window if each == "sliding_attention" else 0 for each in kinds)
    first = config.get("max_window_layers", FULL_LAYERS)
    return tuple(window if layer >= first else 0 for layer in range(num_layers))


def need(config: dict[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ModelError(f"config.json has no {key!r}; is this the folder of a causal language model?")
    return config[key]
