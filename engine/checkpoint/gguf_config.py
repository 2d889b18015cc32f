"""Translates GGUF metadata and tensor names into their Hugging Face form."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, TypeVar

from slipstream.engine.checkpoint.gguf_file import GGUFFile
from slipstream.engine.checkpoint.shapes import head_dim, parameter_shapes
from slipstream.engine.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Number = TypeVar("Number", bound=np.generic)

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"

# Keys that change the computation in a way the translated configuration cannot express.
UNTRANSLATED = (
    "expert_count",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.scale",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


class _Metadata:
    """Typed look-ups with errors that name the file and the key."""

    def __init__(self, file: GGUFFile) -> None:
        self.values = file.metadata
        self.path = file.path

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, value, "a number")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]  # given per layer, the same for every layer
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self._wrong(key, value, "one positive whole number")
        return value

    def token_id(self, name: str) -> int | None:
        return next(iter(self.token_ids(name)), None)

    def token_ids(self, name: str) -> list[int]:
        """One, several where the file has a list, or none."""
        value = self.values.get(f"tokenizer.ggml.{name}")
        values = value if isinstance(value, list) else [value]
        return [each for each in values if isinstance(each, int) and not isinstance(each, bool)]

    def _wrong(self, key: str, value: object, wanted: str) -> ModelError:
        found = "is missing" if value is None else f"is {str(value)[:40]!r}"
        return ModelError(f"{self.path}: the metadata {key} {found}; {wanted} is needed. Convert the model again.")


def translate_config(file: GGUFFile) -> dict[str, Any]:
    """The model's configuration as Hugging Face's config.json states it, checked against the tensors of the file."""
    meta = _Metadata(file)
    arch = meta.text("general.architecture")
    _check_supported(file, arch)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path} has no token embedding (token_embd.weight), so it is not a language model")
    hidden = meta.count(f"{arch}.embedding_length")
    heads = meta.count(f"{arch}.attention.head_count")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta.count(f"{arch}.feed_forward_length"),
        "num_hidden_layers": meta.count(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.count(f"{arch}.attention.head_count_kv", default=heads),
        "head_dim": meta.count(f"{arch}.attention.key_length", default=hidden // heads or 1),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": meta.count(f"{arch}.context_length"),
        "rms_norm_eps": meta.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = meta.token_id(f"{name}_token_id")
    config["pad_token_id"] = meta.token_id("padding_token_id")
    if arch == "llama" and file.metadata.get(f"{arch}.attention.sliding_window"):
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        config["sliding_window"] = meta.count(f"{arch}.attention.sliding_window")
    size = head_dim(config)
    for key in ("rope.dimension_count", "attention.value_length"):
        if meta.count(f"{arch}.{key}", default=size) != size:
            raise _unsupported(file, f"{arch}.{key} other than the head size {size}")
    if size % 2 or heads % config["num_key_value_heads"]:
        raise ModelError(
            f"{file.path} states {heads} heads of size {size} for {config['num_key_value_heads']} KV heads"
        )
    config["rope_parameters"] = _rope_parameters(file, meta, arch, config)
    _check_tensors(file, config)
    return config


def translate_generation_config(file: GGUFFile) -> dict[str, Any]:
    """What generation_config.json states: the tokens that end a text and the recommended sampling parameters."""
    meta = _Metadata(file)
    ends = [end for name in ("eos_token_id", "eot_token_id", "eom_token_id") for end in meta.token_ids(name)]
    config: dict[str, Any] = {
        "bos_token_id": meta.token_id("bos_token_id"),
        "eos_token_id": list(dict.fromkeys(ends)),
        "pad_token_id": meta.token_id("padding_token_id"),
    }
    sampling = {
        "temp": "temperature",
        "top_k": "top_k",
        "top_p": "top_p",
        "min_p": "min_p",
        "penalty_repeat": "repetition_penalty",
    }
    for key, name in sampling.items():
        value = file.metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float) and math.isfinite(value):
            config[name] = value
    return {key: value for key, value in config.items() if value is not None and value != []}


def huggingface_name(name: str) -> str | None:
    """The Hugging Face parameter for a GGUF tensor name such as blk.3.attn_q.weight; None if there is none."""
    match = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,5})\.)?(\w+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, module, kind = match.groups()
    known = TENSOR_NAMES if layer is None else LAYER_TENSOR_NAMES
    if module not in known:
        return None
    return f"{known[module]}.{kind}" if layer is None else f"model.layers.{layer}.{known[module]}.{kind}"


def unpermute_rope_rows(rows: npt.NDArray[Number], num_heads: int) -> npt.NDArray[Number]:
    """Undoes, of rows [rows, anything], the order of the query and key projections in GGUF files of architecture llama.

    Those rotate neighbouring rows (2i, 2i + 1) of a head together, Hugging Face's rotate rows (i, i + head_dim / 2).
    """
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _check_supported(file: GGUFFile, arch: str) -> None:
    if arch not in ARCHITECTURES:
        raise ModelError(
            f"{file.path} holds a model of architecture {arch!r}. GGUF files are translated for "
            f"{', '.join(ARCHITECTURES)} (llama covers Llama, Mistral and SmolLM); serve any other model from its "
            "Hugging Face folder, which works through the transformers fallback."
        )
    if file.metadata.get("split.count") not in (None, 0, 1):  # 0 where parts were joined
        raise ModelError(
            f"{file.path} is one of several parts; join them with `llama-gguf-split --merge FIRST_PART WHOLE.gguf`"
        )
    for key in UNTRANSLATED:
        if file.metadata.get(f"{arch}.{key}"):
            raise _unsupported(file, f"{arch}.{key}")


def _unsupported(file: GGUFFile, what: str) -> ModelError:
    return ModelError(
        f"{file.path}: {what} is not supported in GGUF form. Use the Hugging Face folder of this model instead, which "
        "works natively or through the transformers fallback."
    )


def _rope_parameters(file: GGUFFile, meta: _Metadata, arch: str, config: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{arch}.rope."
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": meta.number(prefix + "freq_base", default=10000.0)}
    scaling = file.metadata.get(prefix + "scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        if scaling != "none":
            raise _unsupported(file, f"rope scaling {scaling!r} together with {ROPE_FACTORS}")
        info = file.tensors[ROPE_FACTORS]
        if info.shape != (config["head_dim"] // 2,):
            raise ModelError(f"{file.path}: {ROPE_FACTORS} has shape {list(info.shape)}, half the head size is needed")
        factors = file.tensor(ROPE_FACTORS).astype("float64").tolist()
        if not all(math.isfinite(factor) and factor > 0 for factor in factors):
            raise ModelError(
                f"{file.path}: {ROPE_FACTORS} holds values that are not positive. Convert the model again."
            )
        # Llama 3's scaling in its computed form: frequency i is divided by factors[i]. Hugging Face's name for
        # factors that are given one by one is longrope.
        return rope | {
            "rope_type": "longrope",
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": config["max_position_embeddings"],
            "short_factor": factors,
            "long_factor": factors,
        }
    if scaling == "none" and prefix + "scale_linear" in file.metadata:  # the key of files from before August 2023
        return rope | {"rope_type": "linear", "factor": meta.number(prefix + "scale_linear")}
    if scaling == "none":
        return rope
    if scaling not in ("linear", "yarn"):
        raise _unsupported(file, f"rope scaling {scaling!r} (none, linear and yarn are supported)")
    rope |= {"rope_type": scaling, "factor": meta.number(prefix + "scaling.factor")}
    if scaling == "linear" and prefix + "scaling.original_context_length" in file.metadata:
        rope["original_max_position_embeddings"] = meta.count(prefix + "scaling.original_context_length")
    if scaling == "yarn":
        if meta.number(prefix + "scaling.yarn_ext_factor", default=1.0) != 1.0:
            raise _unsupported(file, f"{prefix}scaling.yarn_ext_factor other than 1")
        original = meta.count(prefix + "scaling.original_context_length", default=config["max_position_embeddings"])
        rope["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if prefix + f"scaling.yarn_{name}" in file.metadata:
                rope[name] = meta.number(prefix + f"scaling.yarn_{name}")
        # llama.cpp multiplies yarn's usual attention factor by these two, Hugging Face states the product.
        relative = math.prod(meta.number(prefix + f"scaling.{key}", 1.0) for key in ("attn_factor", "yarn_attn_factor"))
        if relative != 1.0:
            rope["attention_factor"] = relative * (0.1 * math.log(max(rope["factor"], 1.0)) + 1.0)
    return rope


def _check_tensors(file: GGUFFile, config: dict[str, Any]) -> None:
    """Every parameter the configuration implies is there in its shape, and nothing else."""
    if config["num_hidden_layers"] > len(file.tensors):
        raise ModelError(f"{file.path} states {config['num_hidden_layers']} layers but has {len(file.tensors)} tensors")
    found = {}
    for info in file.tensors.values():
        name = huggingface_name(info.name)
        if name is not None:
            found[name] = info
        elif info.name != ROPE_FACTORS and not info.name.endswith(".attn_rot_embd.weight"):
            raise ModelError(
                f"{file.path}: tensor {info.name!r} belongs to no known part of a {config['model_type']} model. "
                "Use the Hugging Face folder of this model, which works through the transformers fallback."
            )
    for name, shape in parameter_shapes(config):
        tensor = found.pop(name, None)
        if tensor is None:
            raise ModelError(f"{file.path} lacks the tensor for {name}. Download or convert the file again.")
        if tensor.shape != shape:
            raise ModelError(
                f"{file.path}: tensor {tensor.name!r} has shape {list(tensor.shape)} where the metadata asks for "
                f"{list(shape)}. Download or convert the file again."
            )
    if found:
        extra = next(iter(found.values())).name
        raise ModelError(f"{file.path}: the model that the metadata describes has no place for tensor {extra!r}")
