"""What transformers knows of a model folder: its sizes, and the module with its weights."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from slipstream.engine.checkpoint.checkpoint import Checkpoint
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import ModelShape, model_shape, need, stated_positions
from slipstream.engine.models.paged_attention import ATTENTION, register
from slipstream.engine.models.rope import switch_length
from slipstream.engine.models.weights import is_buffer, require_numbers, unknown

SIZES = ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "num_key_value_heads", "head_dim")
ROPE = ("rope_parameters", "original_max_position_embeddings", "rope_local_base_freq")
QUANTISATION = ("quantization_config", "compression_config")
ERRORS = (
    *(ValueError, LookupError, ImportError, AttributeError, TypeError, OSError, RuntimeError, ArithmeticError),
    *(AssertionError, SafetensorError, StrictDataclassError),
)
"""What transformers raises for files and settings that do not fit."""


def settings_of(config: dict[str, Any]) -> Any:
    """transformers' configuration of the part that generates text; ModelError where it does not know the model."""
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = need(config, "model_type")
    if kind not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise ModelError(
                f"the model type {kind!r} needs Python code that comes with the model, which is not run; serve a "
                "conversion of the model to an architecture that transformers has itself, if there is one"
            )
        raise ModelError(f"transformers does not know the model type {kind!r}; a newer version may")
    try:
        return AutoConfig.for_model(**config).get_text_config()
    except ERRORS as error:
        raise ModelError(f"transformers cannot read the configuration of type {kind!r}: {_words(error)}") from error


def transformers_shape(config: dict[str, Any]) -> ModelShape:
    """The shape that any configuration which transformers knows has, whatever it calls its sizes; see model_shape."""
    settings = settings_of(config)
    kind = config["model_type"]
    if getattr(settings, "is_encoder_decoder", False):
        raise ModelError(f"{kind!r} models have an encoder and a decoder; models of a decoder alone are served")
    try:
        sizes = {name: getattr(settings, name, None) for name in (*SIZES, *ROPE, "max_position_embeddings")}
    except RuntimeError as error:  # transformers says so of what is stated layer by layer
        why = "their layers differ in size, and a cache's do not"
        raise ModelError(f"{kind!r} models are not supported: {why}") from error
    if not sizes["num_attention_heads"]:
        raise ModelError(
            f"{kind!r} models have no attention heads: recurrent models keep a state instead of keys and values, which "
            "is not supported"
        )
    rotated = getattr(settings, "qk_rope_head_dim", None)
    if rotated and (plain := getattr(settings, "qk_nope_head_dim", None)):  # DeepSeek: expanded, every head has keys
        sizes |= {"head_dim": rotated + plain, "num_key_value_heads": sizes["num_attention_heads"]}
    elif getattr(settings, "multi_query", False):
        sizes["num_key_value_heads"] = 1
    return model_shape({"model_type": kind, **{name: size for name, size in sizes.items() if size is not None}})


def _words(error: Exception) -> str:
    """What an error says, in one line; with its kind where it names a thing alone, as a missing key."""
    text = " ".join(str(error).split())
    return text if " " in text else f"{type(error).__name__} {text}"


def transformers_switch_length(config: dict[str, Any]) -> int:
    settings = settings_of(config)
    known = {name: value for name in ROPE if (value := getattr(settings, name, None)) is not None}
    positions = {"max_position_embeddings": getattr(settings, "max_position_embeddings", None)}  # some state none
    return switch_length(known, stated_positions(positions)) if known else 0


def is_of_transformers(checkpoint: Checkpoint) -> bool:
    """Whether transformers reads these files: quantised ones take packages, and often a GPU."""
    return checkpoint.path.is_dir() and checkpoint.quantisation is None


def build_module(config: dict[str, Any], dtype: torch.dtype, checkpoint: Checkpoint | None, seed: int) -> Any:
    """The module with the weights of a checkpoint, or random ones; its attention is paged_attention."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    kind = config["model_type"]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"transformers has no class for generating text with {kind!r} models alone")
    logging.disable_progress_bar()
    register()
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": ATTENTION}
    try:
        if checkpoint is None:
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), **options)
        weights: dict[str, torch.Tensor] = {}
        if is_of_transformers(checkpoint):
            module, info = AutoModelForCausalLM.from_pretrained(
                checkpoint.path, local_files_only=True, output_loading_info=True, **options
            )
        else:  # widened by the project's own readers
            settings = AutoConfig.for_model(**{key: config[key] for key in config if key not in QUANTISATION})
            for name, tensor in checkpoint.tensors():
                require_numbers(name, not is_buffer(name) and not tensor.is_floating_point())
                weights[name] = tensor.to(dtype)
            module, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)].from_pretrained(
                None, config=settings, state_dict=weights, output_loading_info=True, **options
            )
    except ERRORS as error:
        if isinstance(error, KeyError) and ATTENTION in str(error):
            raise ModelError(
                f"{kind!r} models are not supported: their code in transformers computes attention itself and does "
                "not leave it to a paged cache"
            ) from error
        raise ModelError(f"transformers cannot load a causal model of type {kind!r}: {_words(error)}") from error
    if missing := sorted(info["missing_keys"]):
        some = ", ".join(missing[:3])
        raise ModelError(f"the checkpoint in {checkpoint.path} lacks {len(missing)} tensors, for example {some}")
    extra = sorted(name for name in info["unexpected_keys"] if not is_buffer(name))
    # Some quantisers add biases of nothing but zeros.
    extra = [name for name in extra if not name.endswith(".bias") or name not in weights or weights[name].any()]
    if extra:
        raise unknown(extra[0], type(module).__name__)
    return module
