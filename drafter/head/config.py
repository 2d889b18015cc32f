"""What an EAGLE head is: config.json as SGLang and vLLM read it, and shapes of tensors. Imports no torch.

EAGLE-3 (Li et al. 2025, arXiv:2503.01840) fuses features of several layers and normalises what its layer reads. EAGLE-1
and -2 (arXiv:2401.15077, 2406.16858), which differ in drafting only, fuse the target's last hidden state with the
embedding of the token, normalise neither, and use the target's own output matrix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slipstream.engine.checkpoint.safetensors_files import INDEX_FILE, SINGLE_FILE, StoredTensor, find_tensors
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import DecoderConfig, check_heads
from slipstream.engine.models.rope import rope_parameters

if TYPE_CHECKING:
    from slipstream.kernels.compute import LayerShape

Kind = Literal["eagle", "eagle3"]
ARCHITECTURES: dict[str, Kind] = {
    "LlamaForCausalLMEagle3": "eagle3",
    "LlamaForCausalLMEagle": "eagle",
    "EagleLlamaForCausalLM": "eagle",
    "LlamaForCausalLM": "eagle",  # as the first ones were published
}
LAYER = "midlayer."
"""Prefix of the layer's tensors in an EAGLE-3 head."""
FIRST_LAYER = "layers.0."
"""Prefix of the layer's tensors in an EAGLE-1 or -2 head."""
PICKLE_FILE = "pytorch_model.bin"
OUTPUT = "lm_head.weight"
"""The output matrix of an EAGLE-3 head; often rows of the target's."""
TAPS = "eagle_aux_hidden_state_layer_ids"
MOST = 1 << 31
"""Sizes are less."""
VARIANTS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias")
"""Switches of config.json for layers that compute something else than ours."""
SILU = ("silu", "swish")
"""The activation of our layers, by its names."""
UNREAD = re.compile(r"(model\.)?embed_tokens\.weight|lm_head\.weight|.*rotary_emb\.inv_freq")
"""Tensors that heads come with and that are computed here, or are the target's; ``t2d`` says what ``d2t`` says."""

NO_WHOLE_NUMBERS = (
    "the drafter's 'd2t' holds numbers with a point, which are not exact: it was converted with the weights; take it "
    "as it was published"
)


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """One decoder layer over features of the target; embeddings are the target's own."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    """Size of the target's vocabulary."""
    draft_vocab_size: int
    """Tokens that the head can propose."""
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
        """Shape of every tensor in the file."""
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
            OUTPUT: (self.draft_vocab_size, hidden),
            "d2t": (self.draft_vocab_size,),
            "t2d": (self.vocab_size,),
        }

    def layer_shape(self, target: DecoderConfig) -> LayerShape:
        """What its layer looks like, and reads."""
        return replace(self.as_decoder(target).layer, reads="both" if self.kind == "eagle3" else "plain")

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
            window_rope=None,
            more={},
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
    """Reads config.json for a target of ``num_layers`` layers. Raises ModelError for what is no EAGLE head."""
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
    if (activation := config.get("hidden_act", "silu")) not in SILU:
        raise ModelError(
            f"the drafter's activation (hidden_act) is {activation!r}; heads with {SILU[0]!r} are supported"
        )
    if config.get("num_hidden_layers", 1) != 1:
        raise ModelError(f"the drafter has {config['num_hidden_layers']} layers; heads of one layer are supported")
    try:
        taps = _parse_taps(config) or (default_taps(num_layers) if kind == "eagle3" else (num_layers,))
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
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
            rope=rope_parameters(config),
            max_positions=config.get("max_position_embeddings", 2048),
            kind=kind,
            fc_bias=kind == "eagle" and bool(config.get("bias", True)),
        )
    except KeyError as error:
        raise ModelError(f"config.json of the drafter has no {error}") from None
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"config.json of the drafter is malformed: {error}") from None
    sizes = [head.hidden, head.intermediate, head.heads, head.kv_heads, head.head_dim, head.vocab_size]
    sizes += [head.draft_vocab_size, head.max_positions]
    if not all(type(size) is int and 0 < size < MOST for size in sizes):
        raise ModelError("config.json of the drafter is malformed: its sizes are not all whole numbers from 1 on")
    check_heads(head.heads, head.kv_heads)
    if not all(type(tap) is int and 0 <= tap < MOST for tap in head.taps):
        raise ModelError("config.json of the drafter is malformed: the layers it reads")
    if type(head.norm_eps) not in (int, float):
        raise ModelError(f"config.json of the drafter is malformed: rms_norm_eps is {head.norm_eps!r}")
    return head


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


def check_shapes(config: HeadConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ModelError where tensors are missing, of the wrong shape, or of a layer that computes something else."""
    for name, shape in config.shapes.items():
        if name not in shapes:
            if name == "t2d" or (name == "d2t" and config.draft_vocab_size == config.vocab_size):
                continue
            raise ModelError(f"the drafter's weights lack {name!r}")
        if shapes[name] != shape:
            raise ModelError(f"the drafter's {name!r} has shape {list(shapes[name])}, not {list(shape)}")
    if others := [name for name in shapes if name not in config.shapes and not UNREAD.fullmatch(name)]:
        raise ModelError(
            f"the drafter is a variant of EAGLE that is not supported: its weights have {', '.join(others[:4])}"
        )


def read_config(folder: Path, num_layers: int) -> HeadConfig:
    """Reads the content of config.json for a target of so many layers; raises ModelError naming what is wrong."""
    path = folder / "config.json"
    try:
        return parse_config(json.loads(path.read_text()), num_layers)
    except FileNotFoundError:
        raise ModelError(f"{folder} is no drafter: {path} does not exist") from None
    except OSError as error:
        raise ModelError(f"{folder} is no drafter: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the drafter in {folder} is damaged: config.json is not JSON: {error}") from None


def is_pickled(folder: Path) -> bool:
    """Whether the weights have the form of the first EAGLE heads."""
    return (folder / PICKLE_FILE).exists() and not _has_safetensors(folder)


def find_weights(folder: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a published head are, in one file or in shards; raises ModelError if there are none, or a
    file is damaged."""
    if not _has_safetensors(folder):
        raise ModelError(f"{folder} is no drafter: {folder / SINGLE_FILE} does not exist")
    try:
        return find_tensors(folder)
    except ModelError as error:
        raise ModelError(f"the drafter in {folder} is damaged: {error}") from None


def _has_safetensors(folder: Path) -> bool:
    return any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


def write_config(folder: Path, config: HeadConfig) -> None:
    """Writes config.json of a published head."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
