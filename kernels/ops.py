"""Every operation that models, drafters and the sampler are made of, and which backend computes it.

A backend is a class with a method per operation; it inherits those it does not have from another one. Each device gets
the first backend of ``BACKENDS`` that runs on it, once; ``use_backend`` makes all devices use one by name. Where a
gradient is wanted the plain torch operations are used, since compiled ones have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from slipstream.kernels.native.ops import NativeOps
from slipstream.kernels.reference import NEVER as NEVER
from slipstream.kernels.reference import NOTHING as NOTHING
from slipstream.kernels.reference import ReferenceOps
from slipstream.kernels.triton.ops import TritonOps

BACKENDS: list[type[ReferenceOps]] = [NativeOps, TritonOps, ReferenceOps]
"""Backends, preferred ones first."""
COLDEST = torch.finfo(torch.float32).tiny
"""Lower temperatures count as this one, which leaves the largest logit and its equals: their inverse is not a float."""

_PLAIN = ReferenceOps()
_forced: list[str] = []


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n] scaled to unit root mean square, times weight [n]; computed in float32 (Zhang & Sennrich 2019)."""
    return _backend(x, weight).rms_norm(x, weight, eps)


def rms_norm_plus_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` as Gemma has it: the factor is 1 + weight, and nothing is rounded before the end."""
    return _backend(x, weight).rms_norm_plus_one(x, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [tokens, heads, head_dim] by position; cos, sin [tokens, head_dim / 2] (Su et al. 2021).

    Element i pairs with element i + head_dim / 2, the order of Hugging Face checkpoints.
    """
    return _backend(x).rope(x, cos, sin)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020)."""
    return _backend(gate, up).silu_mul(gate, up)


def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, elementwise, with the approximation by tanh (Hendrycks & Gimpel 2016)."""
    return _backend(gate, up).gelu_tanh_mul(gate, up)


def experts(x: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor, top: int, renormalize: bool) -> Tensor:
    """A mixture of gated networks (Shazeer et al. 2017): the weighted sum of what each row's experts make of it.

    Args:
        x: [rows, hidden].
        scores: [rows, experts], of whose softmax the ``top`` largest count; made to add up to 1 with ``renormalize``.
        gate_up: [experts, 2 * inner, hidden]: gate, then up.
        down: [experts, hidden, inner].
    """
    return _backend(x, scores).experts(x, scores, gate_up, down, top, renormalize)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, k] times the transpose of weight [n, k], plus bias [n]: [rows, n]; all of one dtype."""
    return _backend(x, weight).linear(x, weight, bias)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """The rows ids [n] of weight [rows, k]."""
    return _backend(weight).embedding(ids, weight)


def argmax(logits: Tensor) -> Tensor:
    """Index of the first largest logit of each row [rows]; -1 where it is not finite or the row holds a NaN, but
    NOTHING where every logit is NEVER."""
    return _backend(logits).argmax(logits)


def argmax_with_probability(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What argmax returns, and the probability of each token at temperature 1 [rows]; 0 where there is none."""
    return _backend(logits).argmax_with_probability(logits)


def distribution(logits: Tensor, temperature: Tensor, top_k: Tensor, min_p: Tensor, top_p: Tensor) -> Tensor:
    """Weights proportional to the probability of sampling each token; may overwrite logits [rows, vocab] float32.

    In this order: divide by temperature (from 0 to COLDEST all the same), keep the top_k largest (0: all), drop what is
    less likely than min_p times the most likely, keep the smallest set with mass top_p of what is left (Holtzman et al.
    2020; 1: all). Tokens as likely as the last one kept stay with it. The parameters are [rows]: top_k int32, the rest
    float32.
    """
    return _backend(logits).distribution(logits, temperature.clamp(min=COLDEST), top_k, min_p, top_p)


def draw(weights: Tensor, seeds: Tensor, indices: Tensor) -> Tensor:
    """One token per row of weights [rows, vocab], with a probability in proportion to its weight: the first of a race.

    -1 for a row without weight; see ``race``.
    """
    return race(weights, seeds, indices)[0][:, 0]


def race(
    weights: Tensor, seeds: Tensor, indices: Tensor, count: int = 1, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first ``count`` of an exponential race (the Gumbel maximum): places [rows, count] int64 and their scores.

    The score of a place of weights [rows, n] float32 is its weight divided by its noise, which belongs to the row's
    seed, to the row's index, and to the token ``ids`` [n] int32 that stands at the place (without: the place itself);
    see ``random``. The largest score is a place's with a probability in proportion to its weight, and whoever races
    similar weights with the same noise mostly comes to the same token. A weight of 0 takes no part; where fewer than
    ``count`` do, places are -1 and scores 0.

    Weights may have any scale that leaves scores finite. Seeds and indices [rows] are unsigned 64-bit numbers in int64.
    Backends find the same places for the same weights, except where scores differ by less than one part in 100,000:
    noise is made in double precision on a CPU, in single precision on a GPU.
    """
    return _backend(weights).race(weights, seeds, indices, count, ids)


def change_logits(
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
    """Applies biases, bans and penalties to some rows of logits [all rows, vocab] float32 in place.

    Args:
        rows: [n] int32, the rows that are changed.
        place: [entries] int32, which of these n an entry is about.
        tokens: [entries] int32, distinct tokens of each row.
        added: [entries] float32, what is added first; minus infinity bans a token.
        counts: [entries] int32, how often the output has it; 0 for a token of the prompt only, -1 for one of neither.
        repetition: [n] float32, which divides (if positive) or multiplies (if negative) logits of tokens that were
            there before (Keskar et al. 2019); 1 for none.
        frequency, presence: [n] float32; frequency * count + presence is subtracted from those of the output.
    """
    _backend(logits).change_logits(logits, rows, place, tokens, added, counts, repetition, frequency, presence)


def allow_only(logits: Tensor, start: Tensor, tokens: Tensor) -> None:
    """Bans all tokens but those of a row's list in logits [rows, vocab] float32, in place; an empty list bans none.

    The list of row r is ``start[r] : start[r + 1]`` of ``tokens``, ascending; both int32.
    """
    _backend(logits).allow_only(logits, start, tokens)


def log_probabilities(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities by logits [rows, vocab] at temperature 1: of one token a row, and of the ``count`` most likely.

    Returns the log-probabilities of the tokens [rows] float32; their ranks [rows] int32, one more than the number of
    larger logits; the most likely tokens, best first [rows, count] int32, -1 where there are no more; and their
    log-probabilities [rows, count] float32. A token of -1 is none, with minus infinity and rank 0. All of a row are NaN
    where one of its logits is, or the largest is not finite.
    """
    return _backend(logits).log_probabilities(logits, tokens, count)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Has this backend compute operations in all threads, whatever the device; for tests and measurements."""
    _named(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def backend_names() -> list[str]:
    """Backends that run on this machine's CPU, preferred ones first."""
    return [backend.name for backend in BACKENDS if backend.runs_on(torch.device("cpu"))]


def _backend(*operands: Tensor) -> ReferenceOps:
    if _forced:
        return _named(_forced[-1])
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        return _PLAIN
    return _for_device(operands[0].device)


@cache
def _for_device(device: torch.device) -> ReferenceOps:
    return _named(next(backend.name for backend in BACKENDS if backend.runs_on(device)))


@cache
def _named(name: str) -> ReferenceOps:
    found = [backend for backend in BACKENDS if backend.name == name]
    if not found:
        raise ValueError(f"there is no backend {name!r}; there are {', '.join(backend.name for backend in BACKENDS)}")
    return found[0]()
