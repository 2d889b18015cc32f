"""EAGLE heads as tensors, and as files that SGLang and vLLM read."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import save_file
from torch import Tensor

from slipstream.drafter.head.config import (
    LAYER,
    NO_WHOLE_NUMBERS,
    PICKLE_FILE,
    check_shapes,
    find_weights,
    is_pickled,
    read_config,
    write_config,
)
from slipstream.drafter.head.config import HeadConfig as HeadConfig
from slipstream.drafter.head.config import check_target as check_target
from slipstream.drafter.head.config import config_for as config_for
from slipstream.drafter.head.config import default_taps as default_taps
from slipstream.drafter.head.config import parse_config as parse_config
from slipstream.engine.background import breathe
from slipstream.engine.checkpoint.safetensors_files import read_tensors
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import DecoderConfig

LAYERS = "model.layers."
"""Where the target's layers are."""


def random_tensors(config: HeadConfig, seed: int) -> dict[str, Tensor]:
    """An untrained head; its draft vocabulary is the first tokens of the vocabulary."""
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
        draft_tokens: the draft vocabulary, ``config.draft_vocab_size`` different tokens.

    Raises ModelError where the sizes do not match.
    """
    prefix = f"{LAYERS}{_last_index(target)}."
    target = _as_llama(target, prefix, config)
    tokens = torch.tensor(sorted(set(draft_tokens)))
    if len(tokens) != config.draft_vocab_size or tokens[0] < 0 or tokens[-1] >= config.vocab_size:
        raise ModelError(f"a head needs {config.draft_vocab_size} different tokens as its draft vocabulary")
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


def _as_llama(target: Mapping[str, Tensor], prefix: str, config: HeadConfig) -> dict[str, Tensor]:
    """The parameters of a last layer of another kind, as far as a layer of Llama's has a place for them."""
    found = dict(target)
    if prefix + "pre_feedforward_layernorm.weight" in found:  # Gemma's norms multiply by 1 + weight
        found[prefix + "post_attention_layernorm.weight"] = found[prefix + "pre_feedforward_layernorm.weight"]
        for name in ("post_attention_layernorm", "input_layernorm"):
            found[f"{prefix}{name}.weight"] = found[f"{prefix}{name}.weight"] + 1
        found["model.norm.weight"] = found["model.norm.weight"] + 1
    if (
        prefix + "mlp.gate.weight" in found
    ):  # of a mixture nothing is kept: the head's own network begins with giving zero
        generator = torch.Generator().manual_seed(0)
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = config.shapes[f"{LAYER}mlp.{name}.weight"]
            found[f"{prefix}mlp.{name}.weight"] = torch.randn(shape, generator=generator) * config.hidden**-0.5
        found[prefix + "mlp.down_proj.weight"].zero_()
    return found


def output_name(names: Container[str]) -> str:
    """Name of the target's output matrix: the embeddings themselves where a checkpoint has no other."""
    return "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"


def draft_maps(draft_tokens: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """``d2t`` and ``t2d`` for a head with this draft vocabulary, whose tokens must ascend."""
    return {
        "d2t": draft_tokens - torch.arange(len(draft_tokens)),
        "t2d": torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, draft_tokens, True),
    }


def draft_tokens(config: HeadConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """[draft vocabulary] int64: the target's tokens that a head can propose; without ``d2t``, all of them."""
    indices = torch.arange(config.draft_vocab_size)
    return tensors["d2t"].long() + indices if "d2t" in tensors else indices


def _last_index(target: Mapping[str, Tensor]) -> int:
    return max(int(name.split(".")[2]) for name in target if name.startswith(LAYERS))


def last_layer(tensors: Iterable[tuple[str, Tensor]], num_layers: int) -> dict[str, Tensor]:
    """What ``from_target`` needs of a checkpoint."""
    keep = (f"{LAYERS}{num_layers - 1}.", "model.embed_tokens.", "model.norm.", "lm_head.")
    return {name: tensor for name, tensor in tensors if name.startswith(keep)}


def check(config: HeadConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises ModelError where tensors are missing, of the wrong shape, or map to tokens that do not exist."""
    check_shapes(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if "d2t" in tensors and tensors["d2t"].is_floating_point():
        raise ModelError(NO_WHOLE_NUMBERS)
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


def read(folder: Path, target: DecoderConfig) -> tuple[HeadConfig, dict[str, Tensor]]:
    """A head from a folder with config.json and model.safetensors; raises ModelError naming what is wrong with it."""
    config = read_config(folder, target.shape.num_layers)
    try:
        tensors = _load(folder)
    except OSError as error:
        raise ModelError(f"{folder} is no drafter: {error}") from None
    except (ValueError, RecursionError, UnpicklingError, EOFError, RuntimeError) as error:
        # What torch raises depends on where a pickle or its archive breaks off.
        raise ModelError(f"the drafter in {folder} is damaged: {error}") from None
    check(config, tensors)
    kept = {name: tensor for name, tensor in tensors.items() if name in config.shapes}
    if "d2t" in kept:
        kept |= draft_maps(draft_tokens(config, kept), config.vocab_size)
    return config, kept


def _load(folder: Path) -> dict[str, Tensor]:
    if not is_pickled(folder):
        return dict(read_tensors(find_weights(folder)))
    path = folder / PICKLE_FILE
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ModelError(f"the drafter in {folder} is damaged: {path.name} does not hold tensors by their names")
    return tensors


def write(folder: Path, config: HeadConfig, tensors: Mapping[str, Tensor]) -> None:
    """The published layout: matrices in bfloat16, ``d2t`` as offsets, ``t2d`` as a mask."""
    write_config(folder, config)
    save_file(stored(tensors), folder / "model.safetensors")


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as files hold them: matrices in bfloat16, every tensor with memory of its own."""
    return {
        name: (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }
