"""Every operation in plain torch: the specification the fast backends are tested against, and their fallback.

What each operation does is said where it is called (``ops``).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels import random

NEVER = float("-inf")
"""The logit of a token that is never sampled."""
NOTHING = -2
"""What is sampled of a row in which no token is left; -1 if it is not finite."""
LIKELIEST = 64
"""Tokens of each row whose noise a race begins with."""


class ReferenceOps:
    """A backend: a method per operation of ``ops``. Others inherit from it, and override what they do faster."""

    name = "reference"

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        """Whether this backend is there and computes on this device; asked once per device."""
        return True

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * scaled.to(x.dtype)

    def rms_norm_plus_one(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (scaled * (1.0 + weight.float())).to(x.dtype)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    def gelu_tanh_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.gelu(gate, approximate="tanh") * up

    def experts(self, x: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor, top: int, renormalize: bool) -> Tensor:
        return experts_mlp(x, *route(scores, top, renormalize), gate_up, down)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        return functional.embedding(ids, weight)

    def argmax(self, logits: Tensor) -> Tensor:
        best = logits.max(dim=-1)
        found = best.indices.masked_fill(~best.values.isfinite(), -1)
        return found.masked_fill(best.values == NEVER, NOTHING)

    def argmax_with_probability(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        best = ReferenceOps.argmax(self, logits)
        likely = logits.softmax(-1).gather(-1, best.clamp(min=0)[:, None])[:, 0]
        return best, likely.masked_fill(best < 0, 0.0)

    def distribution(self, logits: Tensor, temperature: Tensor, top_k: Tensor, min_p: Tensor, top_p: Tensor) -> Tensor:
        ranked = logits.sort(dim=-1, descending=True).values
        border = ranked.gather(1, (top_k.long().clamp(1, logits.shape[1]) - 1)[:, None])
        border[top_k <= 0] = NEVER
        kept = logits.masked_fill(logits < border, NEVER)
        weights = ((kept - ranked[:, :1]) / temperature[:, None]).exp()
        weights = weights.masked_fill(weights < min_p[:, None], 0.0)
        ordered = weights.sort(dim=-1, descending=True).values
        mass = ordered.cumsum(-1)
        last = (mass < mass[:, -1:] * top_p[:, None]).sum(-1).clamp(max=logits.shape[1] - 1)
        nucleus = ordered.gather(1, last[:, None])
        nucleus[top_p >= 1.0] = 0.0
        return weights.masked_fill(weights < nucleus, 0.0)

    def race(
        self, weights: Tensor, seeds: Tensor, indices: Tensor, count: int, ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        n = weights.shape[1]
        amounts = weights.double().cpu().numpy()
        tokens = np.arange(n) if ids is None else ids.cpu().numpy().astype(np.int64)
        keys, counters = (column.cpu().numpy().view(np.uint64)[:, None] for column in (seeds, indices))
        # Noise is made for what may be among the first: what is passed by the likeliest whatever its noise is is not.
        likeliest = weights.topk(min(n, LIKELIEST)).indices.cpu().numpy()
        known = np.take_along_axis(amounts, likeliest, 1) / random.exponential(keys, counters, tokens[likeliest])
        bar = np.sort(known)[:, -count, None] if count <= known.shape[1] else np.zeros((len(amounts), 1))
        blocks = tokens // random.BLOCK
        smallest, _ = random.least(keys, counters, np.arange(blocks.max(initial=0) + 1))
        row, at = ((amounts > 0) & (amounts >= bar * smallest[:, blocks] * (1 - 1e-9))).nonzero()
        scores = np.zeros_like(amounts)
        scores[row, at] = amounts[row, at] / random.exponential(keys[row, 0], counters[row, 0], tokens[at])
        places, found = np.full((2, len(scores), count), -1.0)
        for rank in range(count):
            best = scores.argmax(1)[:, None]
            found[:, rank] = np.take_along_axis(scores, best, 1)[:, 0]
            places[:, rank] = np.where(found[:, rank] > 0, best[:, 0], -1)
            np.put_along_axis(scores, best, 0.0, 1)
        device = weights.device
        return torch.from_numpy(places).to(device, torch.int64), torch.from_numpy(found).to(device, torch.float32)

    def change_logits(
        self,
        logits: Tensor,
        rows: Tensor,
        place: Tensor,
        tokens: Tensor,
        added: Tensor,
        counts: Tensor,
        repetition: Tensor,
        frequency: Tensor,
        presence: Tensor,
    ) -> None:
        place, tokens = place.long(), tokens.long()
        row = rows.long()[place]
        x = logits[row, tokens]
        x = torch.where(added == NEVER, added, torch.where(added == 0, x, x + added))
        by = repetition[place]
        x = torch.where(counts >= 0, torch.where(x > 0, x / by, x * by), x)
        x = torch.where(counts > 0, x - (frequency[place] * counts + presence[place]), x)
        logits[row, tokens] = x

    def allow_only(self, logits: Tensor, start: Tensor, tokens: Tensor) -> None:
        bounds = start.tolist()
        for row, (first, end) in enumerate(pairwise(bounds)):
            if first < end:
                allowed = tokens[first:end].long()
                kept = logits[row, allowed]
                logits[row] = NEVER
                logits[row, allowed] = kept

    def log_probabilities(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logprobs = logits.float().log_softmax(-1)
        own = logprobs.gather(1, tokens.long().clamp(min=0)[:, None])[:, 0]
        ranks = ((logprobs > own[:, None]).sum(-1) + 1).int()
        there = tokens >= 0
        own = torch.where(there | own.isnan(), own, NEVER)
        best = logprobs.topk(min(count, logits.shape[1]))
        room = (0, count - best.values.shape[1])
        top_tokens = functional.pad(best.indices.int(), room, value=-1)
        return own, torch.where(there, ranks, 0), top_tokens, functional.pad(best.values, room, value=NEVER)


def route(scores: Tensor, top: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The ``top`` most likely experts of each row by scores [rows, experts], of equals the first; and their shares.

    Returns [rows, top] int32 and float32. Shares are probabilities, which add up to 1 if they are renormalized.
    """
    shares, experts = scores.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    shares, experts = shares[:, :top], experts[:, :top]
    if renormalize:
        shares = shares / shares.sum(-1, keepdim=True)
    return experts.int().contiguous(), shares.contiguous()


def experts_mlp(x: Tensor, experts: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``mixed`` of gated networks: [experts, 2 * inner, hidden], gate then up, and [experts, hidden, inner]."""

    def network(expert: int, rows: Tensor) -> Tensor:
        gate, up = functional.linear(rows, gate_up[expert]).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, down[expert])

    return mixed(x, experts, shares, network)


def mixed(x: Tensor, experts: Tensor, shares: Tensor, network: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The shares' weighted sum of what each row's experts make of it: [rows, hidden], in the format of x.

    ``network`` computes some rows with an expert. Products with shares are rounded to that format, and added in
    float32 in the order of the experts of the row; an expert of -1 is none. Expert by expert, so it waits for the
    device.
    """
    made = x.new_zeros(*experts.shape, x.shape[1])
    for expert in sorted(set(experts.flatten().tolist())):
        if expert >= 0:
            row, place = torch.where(experts == expert)
            made[row, place] = network(expert, x[row]) * shares[row, place, None].to(x.dtype)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for part in made.unbind(1):
        total += part.float()
    return total.to(x.dtype)


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
