"""Sampling once before the first request: a GPU compiles what is used first, and all requests would wait for that."""

from __future__ import annotations

import numpy as np
import torch

from slipstream.engine.messages import SamplingParams
from slipstream.engine.runner.sampler import SamplingColumns, sample

PLAIN = SamplingParams(max_tokens=1, temperature=0.0)
DRAWN = SamplingParams(max_tokens=1, temperature=0.8, top_k=40, top_p=0.9, min_p=0.01)
CHANGED = SamplingParams(
    max_tokens=1,
    temperature=0.8,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    logit_bias={1: 1.0},
    allowed_token_ids=(0, 1, 2),
    logprobs=0,
)
SAMPLED = ([PLAIN], [DRAWN], [DRAWN, PLAIN], [CHANGED, PLAIN])
"""Requests of a step, by what they ask for."""
REPORTED = (1, 20)
"""Most likely tokens that are told: few, and many."""


@torch.inference_mode()
def warm_up(vocab: int, device: torch.device) -> None:
    """Samples as requests may ask for it, from logits that say nothing."""
    reported = [[SamplingParams(max_tokens=1, temperature=0.0, logprobs=count)] for count in REPORTED]
    for params in (*SAMPLED, *reported):
        columns = SamplingColumns(len(params))
        for slot, each in enumerate(params):
            columns.enter(slot, each, seed=slot, num_prompt=1)
        slots = np.arange(len(params), dtype=np.int32)
        batch = columns.take(slots, np.full(len(params), 2, np.int32), lambda _: np.array([1, 2], np.int32))
        sample(torch.zeros(len(params), vocab, device=device), batch).wait()
