"""The operations that Triton's kernels compute; what they do not take, and the others, torch computes."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.reference import ReferenceOps
from slipstream.kernels.triton import launch

FORMATS = {torch.float32, torch.bfloat16, torch.float16}


class TritonOps(ReferenceOps):
    name = "triton"

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        # Nobody gets the interpreter without asking for it by name.
        return not launch.is_interpreted() and launch.runs_on(device.type)

    def __init__(self) -> None:
        # Only where it computes: Triton takes a while to import, and is not there for every platform.
        from slipstream.kernels.triton import activation, distribution, experts, logits, logprobs, norm, rows, sampling

        self._activation, self._distribution, self._logits = activation, distribution, logits
        self._norm, self._rows, self._sampling = norm, rows, sampling
        self._experts, self._logprobs = experts, logprobs

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not self._fits(x, weight) or x.shape[-1] > self._norm.WIDEST:
            return super().rms_norm(x, weight, eps)
        return self._norm.rms_norm(x, weight, eps)

    def rms_norm_plus_one(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not self._fits(x, weight) or x.shape[-1] > self._norm.WIDEST:
            return super().rms_norm_plus_one(x, weight, eps)
        return self._norm.rms_norm(x, weight, eps, plus_one=True)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        if not self._fits(gate, up) or gate.shape != up.shape:
            return super().silu_mul(gate, up)
        return self._activation.silu_mul(gate, up)

    def gelu_tanh_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        if not self._fits(gate, up) or gate.shape != up.shape:
            return super().gelu_tanh_mul(gate, up)
        return self._activation.gelu_tanh_mul(gate, up)

    def experts(self, x: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor, top: int, renormalize: bool) -> Tensor:
        is_one_format = x.dtype is gate_up.dtype is down.dtype
        if not is_one_format or not self._fits(x, scores) or not (gate_up.is_contiguous() and down.is_contiguous()):
            return super().experts(x, scores, gate_up, down, top, renormalize)
        return self._experts.experts_mlp(x, self._experts.route(scores, top, renormalize), gate_up, down)

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        if not self._fits(weight):
            return super().embedding(ids, weight)
        return self._rows.take_rows(weight, ids.reshape(-1)).view(*ids.shape, -1)

    def argmax(self, logits: Tensor) -> Tensor:
        return self._sampling.argmax(logits) if self._fits(logits) else super().argmax(logits)

    def argmax_with_probability(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if not self._fits(logits):
            return super().argmax_with_probability(logits)
        return self._sampling.argmax_with_probability(logits)

    def distribution(self, logits: Tensor, temperature: Tensor, top_k: Tensor, min_p: Tensor, top_p: Tensor) -> Tensor:
        if not self._fits(logits) or logits.dtype is not torch.float32:
            return super().distribution(logits, temperature, top_k, min_p, top_p)
        return self._distribution.distribution(logits, temperature, top_k, min_p, top_p, out=logits)

    def race(
        self, weights: Tensor, seeds: Tensor, indices: Tensor, count: int, ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not self._fits(weights) or not weights.shape[1]:
            return super().race(weights, seeds, indices, count, ids)
        return self._sampling.race(weights, seeds, indices, count, ids)

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
        given = (rows, place, tokens, added, counts, repetition, frequency, presence)
        if not self._fits(logits) or logits.dtype is not torch.float32:
            return super().change_logits(logits, *given)
        self._logits.change_logits(logits, *given)

    def allow_only(self, logits: Tensor, start: Tensor, tokens: Tensor) -> None:
        if not self._fits(logits) or logits.dtype is not torch.float32:
            return super().allow_only(logits, start, tokens)
        self._logits.allow_only(logits, start, tokens)

    def log_probabilities(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self._fits(logits) or count > self._logprobs.MOST:
            return super().log_probabilities(logits, tokens, count)
        return self._logprobs.log_probabilities(logits, tokens, count)

    def _fits(self, *tensors: Tensor) -> bool:
        return all(tensor.dtype in FORMATS and self._rows.fits(tensor) for tensor in tensors)
