"""What a head is trained for: how far its draft tokens are from the target's tokens or distribution.

Every loss is per row. ``logits`` [n, draft vocabulary] are the head's; ``targets`` [n] are indices into the draft
vocabulary of the tokens that came, -1 where the head cannot propose them; ``probs`` [n, draft vocabulary] is what is
known of the target's distribution. Rows may sum to less than one: the rest lies on tokens that cannot be proposed.

For a greedy request a draft token is the head's most likely one, and it is right if that is the target's, too: what
cross-entropy with the tokens that came learns. For a sampled request both run a race with the same noise, and a draft
token is right if the same token wins both: ``race`` is that chance. There one sampled token says less than the
distribution (DistillSpec, Zhou et al. 2024, compares the divergences).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

LossName = Literal["ce", "kl", "rkl", "jsd", "tv", "tvpp", "nla", "lk", "race"]
NAMES: tuple[LossName, ...] = get_args(LossName)
LEAST = 1e-6
"""Stands for the probability of tokens of which nothing is known."""
LK_STEEPNESS = 3.0
RACED = 16
"""The target's most likely tokens, by which the chance that both races end alike is reckoned."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log q(the token that came); 0 where it cannot be proposed."""
    return functional.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="none")


def forward_kl(logits: Tensor, probs: Tensor) -> Tensor:
    """sum p log(p / q): the head covers all that the target might say."""
    return (probs * (probs.clamp_min(LEAST).log() - logits.float().log_softmax(-1))).sum(-1)


def reverse_kl(logits: Tensor, probs: Tensor) -> Tensor:
    """sum q log(q / p): the head says only what the target might say."""
    log_q = logits.float().log_softmax(-1)
    return (log_q.exp() * (log_q - probs.clamp_min(LEAST).log())).sum(-1)


def jensen_shannon(logits: Tensor, probs: Tensor) -> Tensor:
    """Mean of both KL divergences to the middle between them."""
    log_q = logits.float().log_softmax(-1)
    q = log_q.exp()
    log_middle = ((probs + q) / 2).clamp_min(LEAST).log()
    to_p = (probs * (probs.clamp_min(LEAST).log() - log_middle)).sum(-1)
    return (to_p + (q * (log_q - log_middle)).sum(-1)) / 2


def total_variation(logits: Tensor, probs: Tensor) -> Tensor:
    """1 - sum min(p, q): how often rejection sampling would reject."""
    return 1 - _overlap(logits, probs)


def total_variation_pp(logits: Tensor, probs: Tensor) -> Tensor:
    """TVD++ (Goel et al. 2024): the gradient of total variation as a policy gradient with normalised advantages."""
    q = logits.float().softmax(-1)
    reward = (probs > q).float()
    weight = q.detach()
    mean = (weight * reward).sum() / weight.sum()
    spread = ((weight * (reward - mean) ** 2).sum() / weight.sum()).sqrt().clamp_min(LEAST)
    return -(q * ((reward - mean) / spread)).sum(-1)


def negative_log_acceptance(logits: Tensor, probs: Tensor) -> Tensor:
    """-log sum min(p, q)."""
    return -_overlap(logits, probs).clamp_min(LEAST).log()


def lk_hybrid(logits: Tensor, probs: Tensor) -> Tensor:
    """KL while the head is far off, total variation once it is near: weight exp(-3 acceptance) of KL."""
    share = (-LK_STEEPNESS * _overlap(logits, probs).detach()).exp()
    return share * forward_kl(logits, probs) + (1 - share) * total_variation(logits, probs)


def negative_log_agreement(logits: Tensor, probs: Tensor) -> Tensor:
    """-log of the chance that races with the same noise end alike: sum_i 1 / sum_j max(p_j / p_i, q_j / q_i).

    Over the target's most likely tokens i; what is left of p is taken to lie on other tokens than what is left of q.
    """
    p, at = probs.topk(min(RACED, probs.shape[-1]))
    q = logits.float().softmax(-1).gather(-1, at)
    p_left, q_left = (1 - each.sum(-1, keepdim=True).clamp(max=1.0) for each in (p, q))
    here, there = p[..., None, :] * q[..., :, None], q[..., None, :] * p[..., :, None]
    against = torch.maximum(here, there).sum(-1) + p_left * q + q_left * p
    return -(p * q / against.clamp_min(LEAST**3)).sum(-1).clamp_min(LEAST).log()


_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": forward_kl,
    "rkl": reverse_kl,
    "jsd": jensen_shannon,
    "tv": total_variation,
    "tvpp": total_variation_pp,
    "nla": negative_log_acceptance,
    "lk": lk_hybrid,
    "race": negative_log_agreement,
}


def loss(name: LossName, logits: Tensor, targets: Tensor, probs: Tensor | None) -> Tensor:
    """Per row [n]. Rows of which only the token is known (``probs`` None) are learned by cross-entropy."""
    if name == "ce" or probs is None:
        return cross_entropy(logits, targets)
    return _DIVERGENCES[name](logits, probs)


def drafted(logits: Tensor, targets: Tensor, chance: torch.Generator) -> Tensor:
    """[n] bool: whether the head, which samples, would draft the token that came; a draw for each row."""
    share = logits.float().softmax(-1).gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    drawn = torch.rand(len(targets), generator=chance).to(share.device)  # the same on any device
    return (targets >= 0) & (drawn < share)


def default_loss(greedy: bool) -> LossName:
    """What suits the traffic."""
    return "ce" if greedy else "kl"


def dense(ids: Tensor, logprobs: Tensor, to_draft: Tensor, size: int) -> Tensor:
    """Most likely tokens [n, k] of the target (-1: none) with log-probabilities -> probs [n, size]."""
    index = torch.where(ids >= 0, to_draft[ids.clamp_min(0)], -1)
    probs = torch.where(index >= 0, logprobs.exp(), 0.0)
    return torch.zeros(len(ids), size, device=ids.device).scatter_add_(1, index.clamp_min(0), probs)


def _overlap(logits: Tensor, probs: Tensor) -> Tensor:
    return torch.minimum(logits.float().softmax(-1), probs).sum(-1)
