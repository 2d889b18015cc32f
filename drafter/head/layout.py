"""EAGLE heads as files: names and shapes as SGLang and vLLM read them.

EAGLE-3 (Li et al. 2025, arXiv:2503.01840) fuses features of several layers and normalises what its layer reads. EAGLE-1
and -2 (arXiv:2401.15077, 2406.16858), which differ in drafting only, fuse the target's last hidden state with the
embedding of the token, normalise neither, and use the target's own output matrix.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slipstream.engine.background import breathe
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import DecoderConfig

Kind = Literal["eagle", "eagle3"]
ARCHITECTURES: dict[str, Kind] = {
    "LlamaForCausalLMEagle3": "eagle3",
    "LlamaForCausalLMEagle": "eagle",
    "EagleLlamaForCausalLM": "eagle",
    "LlamaForCausalLM": "eagle",  # as the first ones were published
}
LAYER = "midlayer."
"""Of an EAGLE-3 head."""
FIRST_LAYER = "layers.0."
"""Of an EAGLE-1 or -2 head."""
LAYERS = "model.layers."
"""Where the target's layers are."""
TAPS = "eagle_aux_hidden_state_layer_ids"
MOST = 1 << 31
"""Sizes are less."""
VARIANTS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias")
"""Switches of config.json for layers that compute something else than ours."""


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """One decoder layer over features of the target; embeddings are the target's own."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    """Of the target."""
    draft_vocab_size: int
    """Tokens the head can guess."""
    taps: tuple[int, ...]
    """Layers of the target whose inputs are fused."""
    norm_eps: float
    rope: dict[str, Any]
    max_positions: int
    kind: Kind = "eagle3"
    fc_bias: bool = False
    """Only of EAGLE-1 and -2."""

    @property
    def layer(self) -> str:
        """What the names of the layer's tensors begin with."""
        return LAYER if self.kind == "eagle3" else FIRST_LAYER

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor in the file."""
        hidden, inner = self.hidden, self.intermediate
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        read = 2 * hidden if self.kind == "eagle3" else hidden
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (q, read),
            "self_attn.k_proj.weight": (kv, read),
            "self_attn.v_proj.weight": (kv, read),
            "self_attn.o_proj.weight": (hidden, q),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "post_attention_layernorm.weight": (hidden,),
        }
        if self.kind == "eagle":
            bias = {"fc.bias": (hidden,)} if self.fc_bias else {}
            return {"fc.weight": (hidden, 2 * hidden), **bias, **{FIRST_LAYER + k: shape for k, shape in layer.items()}}
        layer |= {"input_layernorm.weight": (hidden,), "hidden_norm.weight": (hidden,)}
        return {
            "fc.weight": (hidden, len(self.taps) * hidden),
            **{LAYER + name: shape for name, shape in layer.items()},
            "norm.weight": (hidden,),
            "lm_head.weight": (self.draft_vocab_size, hidden),
            "d2t": (self.draft_vocab_size,),
            "t2d": (self.vocab_size,),
        }

    def as_decoder(self, target: DecoderConfig) -> DecoderConfig:
        """The layer as a decoder of one layer."""
        shape = replace(target.shape, num_layers=1, kv_heads=self.kv_heads, head_dim=self.head_dim)
        return replace(
            target,
            shape=shape,
            intermediate=self.intermediate,
            heads=self.heads,
            norm_eps=self.norm_eps,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            qk_norm=False,
            windows=(0,),
            rope=self.rope,
            parameters={},
        )

    def to_json(self) -> dict[str, Any]:
        """config.json of the published layout."""
        return {
            "architectures": [next(name for name, kind in ARCHITECTURES.items() if kind == self.kind)],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": self.rope,
            "rope_theta": self.rope.get("rope_theta", 10000.0),
            "max_position_embeddings": self.max_positions,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            **(_published_taps(self.taps) if self.kind == "eagle3" else {TAPS: list(self.taps), "bias": self.fc_bias}),
        }


def default_taps(num_layers: int) -> tuple[int, ...]:
    """Low, middle and high, as the published heads have them."""
    return tuple(sorted({min(2, num_layers), num_layers // 2, max(num_layers - 3, 0)}))


def _published_taps(taps: tuple[int, ...]) -> dict[str, Any]:
    """The tapped layers as both loaders understand them.

    vLLM reads the list at the top level and takes a number for the input of that layer, as we do. SGLang reads the
    one in eagle_config: if that begins with 1, the numbers mean outputs of layers, one less than the inputs they are;
    otherwise inputs. (SGLang before May 2026 always took them for outputs.)
    """
    published = [tap - 1 for tap in taps] if taps[0] == 2 else list(taps)
    return {
        TAPS: list(taps),
        "num_aux_hidden_states": len(taps),
        "eagle_config": {"use_aux_hidden_state": True, TAPS: published},
    }


def _parse_taps(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers whose inputs the head reads; empty where config.json does not say."""
    if taps := config.get(TAPS):
        return tuple(taps)
    taps = (config.get("eagle_config") or {}).get(TAPS) or ()
    return tuple(tap + 1 for tap in taps) if taps and taps[0] == 1 else tuple(taps)


def config_for(target: DecoderConfig, draft_vocab_size: int, taps: tuple[int, ...] | None = None) -> HeadConfig:
    """A head with the sizes of the target's own layers."""
    return HeadConfig(
        hidden=target.hidden,
        intermediate=target.intermediate,
        heads=target.heads,
        kv_heads=target.shape.kv_heads,
        head_dim=target.shape.head_dim,
        vocab_size=target.shape.vocab_size,
        draft_vocab_size=min(draft_vocab_size, target.shape.vocab_size),
        taps=taps or default_taps(target.shape.num_layers),
        norm_eps=target.norm_eps,
        rope=target.rope,
        max_positions=target.shape.max_positions,
    )


def parse_config(config: Mapping[str, Any], num_layers: int) -> HeadConfig:
    """From config.json; ``num_layers`` of the target. Raises ModelError for what is no EAGLE head."""
    if not isinstance(config, Mapping):
        raise ModelError(f"config.json of the drafter holds a JSON {type(config).__name__}, not an object")
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    kind = next((ARCHITECTURES[name] for name in names if isinstance(name, str) and name in ARCHITECTURES), None)
    if kind is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"the drafter's architecture is {architectures}; EAGLE heads are {known}")
    if variants := [name for name in VARIANTS if config.get(name)]:
        raise ModelError(f"the drafter is a variant of EAGLE that is not supported: {', '.join(variants)}")
    if config.get("num_hidden_layers", 1) != 1:
        raise ModelError(f"the drafter has {config['num_hidden_layers']} layers; heads of one layer are supported")
    try:
        taps = _parse_taps(config) or (default_taps(num_layers) if kind == "eagle3" else (num_layers,))
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        rope = config.get("rope_parameters") or {
            "rope_type": "default",
            "rope_theta": config.get("rope_theta", 10000.0),
        }
        head = HeadConfig(
            hidden=hidden,
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab_size=config["vocab_size"],
            draft_vocab_size=(kind == "eagle3" and config.get("draft_vocab_size")) or config["vocab_size"],
            taps=taps,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=rope,
            max_positions=config.get("max_position_embeddings", 2048),
            kind=kind,
            fc_bias=kind == "eagle" and bool(config.get("bias", True)),
        )
    except KeyError as error:
        raise ModelError(f"config.json of the drafter has no {error}") from None
    except (AttributeError, TypeError, ArithmeticError) as error:
        raise ModelError(f"config.json of the drafter is malformed: {error}") from None
    sizes = [head.hidden, head.intermediate, head.heads, head.kv_heads, head.head_dim, head.vocab_size]
    sizes += [head.draft_vocab_size, head.max_positions]
    if not all(type(size) is int and 0 < size < MOST for size in sizes):
        raise ModelError("config.json of the drafter is malformed: its sizes are not all whole numbers from 1 on")
    if not (all(type(tap) is int and 0 <= tap < MOST for tap in head.taps) and isinstance(head.rope, dict)):
        raise ModelError("config.json of the drafter is malformed: the layers it reads, or its rope_parameters")
    if type(head.norm_eps) not in (int, float):
        raise ModelError(f"config.json of the drafter is malformed: rms_norm_eps is {head.norm_eps!r}")
    return head


def random_tensors(config: HeadConfig, seed: int) -> dict[str, Tensor]:
    """An untrained head; it guesses the first tokens of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in config.shapes.items():
        if name == "d2t":
            tensors[name] = torch.zeros(shape, dtype=torch.int64)
        elif name == "t2d":
            tensors[name] = torch.arange(shape[0]) < config.draft_vocab_size
        elif len(shape) == 1:
            tensors[name] = torch.ones(shape)
        else:
            tensors[name] = torch.randn(shape, generator=generator) * 0.02
    return tensors


def from_target(config: HeadConfig, target: Mapping[str, Tensor], draft_tokens: Sequence[int]) -> dict[str, Tensor]:
    """A head that starts as the target's last layer, which it learns from far faster than from random weights.

    It reads the highest tap and sees nothing yet of the token that follows: the columns for embeddings are zero.

    Args:
        config: as ``config_for`` makes it: the layer has the sizes of the target's.
        target: parameters by their Hugging Face names; of the layers only the last is read (``last_layer`` finds all
            that is needed). Biases and the norms of queries and keys have no place in a head and are left out.
        draft_tokens: what the head can guess, ``config.draft_vocab_size`` different tokens.

    Raises ModelError where the sizes do not match.
    """
    prefix = f"{LAYERS}{_last_index(target)}."
    tokens = torch.tensor(sorted(set(draft_tokens)))
    if len(tokens) != config.draft_vocab_size or tokens[0] < 0 or tokens[-1] >= config.vocab_size:
        raise ModelError(f"a head needs {config.draft_vocab_size} different tokens of the vocabulary to guess from")
    tensors = {
        "fc.weight": torch.eye(config.hidden).repeat(1, len(config.taps)),
        LAYER + "hidden_norm.weight": target[prefix + "input_layernorm.weight"],
        "norm.weight": target["model.norm.weight"],
        "lm_head.weight": target[output_name(target)][tokens],
        **draft_maps(tokens, config.vocab_size),
    }
    tensors["fc.weight"][:, : -config.hidden] = 0
    for name, shape in config.shapes.items():
        if name in tensors:
            continue
        tensor = target[prefix + name.removeprefix(LAYER)]
        if len(shape) == 2 and tensor.shape == (shape[0], shape[1] - config.hidden):
            tensor = torch.cat((torch.zeros_like(tensor), tensor), dim=1)
        tensors[name] = tensor
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    check(config, tensors)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def output_name(names: Container[str]) -> str:
    """Of the target's output matrix: the embeddings themselves where a checkpoint has no other."""
    return "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"


def draft_maps(draft_tokens: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """``d2t`` and ``t2d`` for a head that guesses these tokens, which must ascend."""
    return {
        "d2t": draft_tokens - torch.arange(len(draft_tokens)),
        "t2d": torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, draft_tokens, True),
    }


def draft_tokens(config: HeadConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """[draft vocabulary] int64: the target's tokens that a head guesses; without ``d2t``, all of them."""
    guesses = torch.arange(config.draft_vocab_size)
    return tensors["d2t"].long() + guesses if "d2t" in tensors else guesses


def _last_index(target: Mapping[str, Tensor]) -> int:
    return max(int(name.split(".")[2]) for name in target if name.startswith(LAYERS))


def last_layer(tensors: Iterable[tuple[str, Tensor]], num_layers: int) -> dict[str, Tensor]:
    """What ``from_target`` needs of a checkpoint."""
    keep = (f"{LAYERS}{num_layers - 1}.", "model.embed_tokens.", "model.norm.", "lm_head.")
    return {name: tensor for name, tensor in tensors if name.startswith(keep)}


def check(config: HeadConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises ModelError where tensors are missing, of the wrong shape, or map to tokens that do not exist."""
    for name, shape in config.shapes.items():
        if name not in tensors:
            if name in ("d2t", "t2d") and config.draft_vocab_size == config.vocab_size:
                continue
            raise ModelError(f"the drafter's weights lack {name!r}")
        if tuple(tensors[name].shape) != shape:
            raise ModelError(f"the drafter's {name!r} has shape {list(tensors[name].shape)}, not {list(shape)}")
    tokens = draft_tokens(config, tensors)
    if int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise ModelError("the drafter's 'd2t' maps to tokens outside the vocabulary")
    for name, tensor in tensors.items():
        parts = torch.split(tensor.flatten(), 1 << 18) if tensor.is_floating_point() else ()
        if not all(_is_finite(part) for part in parts):
            raise ModelError(f"the drafter's {name!r} holds numbers that are not finite")


def _is_finite(part: Tensor) -> bool:
    breathe()
    if not len(part):
        return True
    low, high = torch.aminmax(part)  # one pass; NaN is the least and the greatest where there is one
    return bool(low.isfinite()) and bool(high.isfinite())


def check_target(config: HeadConfig, target: DecoderConfig) -> None:
    """Raises ModelError where a head has not the target's sizes."""
    for what, ours, theirs in (
        ("hidden size", config.hidden, target.hidden),
        ("vocabulary", config.vocab_size, target.shape.vocab_size),
    ):
        if ours != theirs:
            raise ModelError(f"the drafter does not fit the model: its {what} is {ours}, the model's {theirs}")
    if config.taps[-1] > target.shape.num_layers:
        raise ModelError(
            f"the drafter does not fit the model: it reads layer {config.taps[-1]} of {target.shape.num_layers}"
        )


def read(folder: Path, target: DecoderConfig) -> tuple[HeadConfig, dict[str, Tensor]]:
    """A head from a folder with config.json and model.safetensors; raises ModelError naming what is wrong with it."""
    try:
        config = parse_config(json.loads((folder / "config.json").read_text()), target.shape.num_layers)
        tensors = _load(folder)
    except FileNotFoundError as error:
        raise ModelError(f"{folder} is no drafter: {error.filename} does not exist") from None
    except OSError as error:
        raise ModelError(f"{folder} is no drafter: {error}") from None
    except (ValueError, RecursionError, SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        # What torch raises depends on where a pickle or its archive breaks off.
        raise ModelError(f"the drafter in {folder} is damaged: {error}") from None
    check(config, tensors)
    return config, {name: tensor for name, tensor in tensors.items() if name in config.shapes}


def _load(folder: Path) -> dict[str, Tensor]:
    file, old = folder / "model.safetensors", folder / "pytorch_model.bin"  # the form of the first EAGLE heads
    is_old = old.exists() and not file.exists()
    tensors: dict[str, Tensor] = torch.load(old, map_location="cpu", weights_only=True) if is_old else load_file(file)
    return tensors


def write(folder: Path, config: HeadConfig, tensors: Mapping[str, Tensor]) -> None:
    """The published layout: matrices in bfloat16, ``d2t`` as offsets, ``t2d`` as a mask."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
    save_file(stored(tensors), folder / "model.safetensors")


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they are in files: matrices in bfloat16, every tensor with memory of its own."""
    return {
        name: (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }
