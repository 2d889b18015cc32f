"""What transformers' models call instead of their own attention and masks.

A model hands over queries, keys and values of a step, and settings of its attention as keyword arguments. Whatever of
these the paged cache does not do is refused by name when the model is loaded: ``Probe`` runs one token through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import ModelShape
from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.kv_cache import AttentionPlan
from slipstream.kernels.torch_adapter import TorchAdapter

ATTENTION = "slipstream_paged"
HARMLESS = ("dropout", "output_attentions", "position_ids", "use_cache", "cache_position", "output_hidden_states")
"""Arguments that change no attention score here: nothing is trained, and positions are in the batch."""


@dataclass(slots=True)
class Step:
    """One forward pass."""

    batch: RaggedBatch
    attention: AttentionPlan
    windows: dict[int, int]
    """Sliding window by layer, where the mask of the model has told it; 0 attends to everything."""
    probe: Probe | None = None
    adapted: list[tuple[slice, TorchAdapter]] = field(default_factory=list)
    """Tokens that have an adapter."""


@dataclass(slots=True)
class Probe:
    """What a model does with one token, written down."""

    shape: ModelShape
    layers: list[int] = field(default_factory=list)
    windows: dict[int, int] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    """How many rows each linear layer was given, in its calls, by the name of its weight."""


STEP: ContextVar[Step | None] = ContextVar("STEP", default=None)
"""Not an argument of the model: some do not pass theirs on to attention."""


def register() -> None:
    """Makes transformers know the attention by its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, paged_attention)
    AttentionMaskInterface.register(ATTENTION, _mask)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, tokens, head_dim]
    key: Tensor,
    value: Tensor,  # its heads may be smaller than those of keys (DeepSeek)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    step = STEP.get()
    layer = getattr(module, "layer_idx", None)
    if step is None or layer is None:
        raise ModelError(f"{type(module).__name__} does not say which layer it is")
    if step.probe is not None:
        _inspect(step.probe, module, layer, key, value, attention_mask, sliding_window, others)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    head_dim = v.shape[-1]
    if head_dim < k.shape[-1]:
        v = torch.nn.functional.pad(v, (0, k.shape[-1] - head_dim))
    step.attention.store(layer, k.contiguous(), v.contiguous())
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    window = step.windows.get(layer, sliding_window or 0)
    out = step.attention.attend(layer, q.contiguous(), scale, window, softcap or 0.0, s_aux)
    return out[None, ..., :head_dim], None  # [1, tokens, heads, head_dim]


def _inspect(
    probe: Probe,
    module: torch.nn.Module,
    layer: int,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sliding_window: int | None,
    others: dict[str, Any],
) -> None:
    """Raises ModelError for what the paged cache does not do."""
    name, shape = type(module).__name__, probe.shape
    if not (getattr(module, "is_causal", True) and others.pop("is_causal", None) in (None, True)):
        raise ModelError(f"{name} attends to tokens that follow, so it does not generate text token by token")
    unknown = sorted(key for key, value in others.items() if key not in HARMLESS and _means_something(value))
    if unknown:
        raise ModelError(f"{name} changes attention by {', '.join(unknown)}, which the paged cache does not support")
    expected = (shape.kv_heads, shape.head_dim)
    if (key.shape[1], key.shape[3]) != expected or value.shape[1] != shape.kv_heads or value.shape[3] > shape.head_dim:
        raise ModelError(
            f"layer {layer} has keys {[key.shape[1], key.shape[3]]} and values {[value.shape[1], value.shape[3]]}; "
            f"the cache holds {shape.kv_heads} heads of {shape.head_dim} for all layers"
        )
    probe.layers.append(layer)
    if mask is None:
        probe.windows[layer] = sliding_window or 0
    elif (window := getattr(mask, "slipstream_window", None)) is not None:
        probe.windows[layer] = window
    else:
        raise ModelError(f"{name} adds a mask or biases of its own (ALiBi, for one) to scores, which is not supported")


def _means_something(value: Any) -> bool:
    return value is not None and value is not False


def _mask(mask_function: Callable[..., Any], device: torch.device | str = "cpu", **_: Any) -> Tensor | None:
    """A mask is only asked for what it does: in a probe the answer goes along with it."""
    step = STEP.get()
    if step is None or step.probe is None:
        return None
    mask = torch.zeros(1, 1, 1, 1, device=device)
    mask.slipstream_window = _window(mask_function, step.probe.shape.max_positions, device)  # type: ignore[attr-defined]
    return mask


def _window(mask_function: Callable[..., Any], max_positions: int, device: torch.device | str) -> int:
    """The sliding window of a causal mask, 0 for none; ModelError for any other mask."""
    last = max_positions - 1
    keys = torch.arange(max_positions, device=device)
    zero = torch.zeros((), dtype=torch.long, device=device)
    seen: list[tuple[int, int]] = []  # position, and how many keys it sees
    for position in _samples(last):
        visible = torch.as_tensor(mask_function(zero, zero, torch.tensor(position, device=device), keys))
        visible = visible.expand(max_positions)
        if bool(visible[position + 1 :].any()):
            raise ModelError("its tokens attend to those that follow, so it does not generate text token by token")
        count = int(visible.sum())
        if not bool(visible[position - count + 1 : position + 1].all()):
            raise ModelError("its tokens do not attend to all of the past, nor to a sliding window of it")
        seen.append((position, count))
    window = max(count for _, count in seen)
    if any(count != min(window, position + 1) for position, count in seen):
        raise ModelError("its tokens attend within chunks, which the paged cache does not support")
    return window if window < max_positions else 0


def _samples(last: int) -> Iterable[int]:
    """Positions at which chunks of any size would show."""
    return sorted({0, 1, last // 7, last // 3, last // 2, last - 1, last} & set(range(last + 1)))
