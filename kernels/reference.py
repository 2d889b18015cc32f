"""Every operation in plain torch: the specification the fast backends are tested against, and their fallback."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n] scaled to unit root mean square, times weight [n]; computed in float32 (Zhang & Sennrich 2019)."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [tokens, heads, head_dim] by position; cos, sin [tokens, head_dim / 2] (Su et al. 2021).

    Element i pairs with element i + head_dim / 2, the order of Hugging Face checkpoints.
    """
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020)."""
    return functional.silu(gate) * up


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last tokens of one sequence.

    Args:
        q: [queries, heads, head_dim], the last ``queries`` positions of the sequence.
        k, v: [length, kv_heads, head_dim], every position.
        window: attend to the last ``window`` positions only; 0 for all.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        sinks: [heads], the score of one more key without a value per head (Xiao et al. 2023).
    Returns:
        [queries, heads, head_dim] in the dtype of q; computed in float32.
    """
    queries, length = q.shape[0], k.shape[0]
    group = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(group, dim=1)
    values = v.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float() * scale, keys)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(length - queries, length, device=q.device)[:, None]
    key = torch.arange(length, device=q.device)[None, :]
    visible = key <= position
    if window:
        visible &= key > position - window
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(-1, queries, 1)
        scores = torch.cat((scores, sink), dim=-1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :-1], values).to(q.dtype)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
