"""What requests need, done once before the first: a GPU compiles what it is to do, and all would wait for it."""

from __future__ import annotations

import numpy as np
import torch

from slipstream.engine.messages import SamplingParams
from slipstream.engine.runner.runner import ModelRunner
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


PROMPT, CONTEXT = 300, 100
"""A prompt that is too long for a graph, beside a short sequence that goes on."""


def warm_up(runner: ModelRunner, longest: int, max_step_tokens: int) -> None:
    """Sampling, and a step of a prompt with a token of another request; steps of one kind are measured anyway."""
    runner.profile(1, 1, min(CONTEXT, longest), min(PROMPT, longest, max_step_tokens - 1))
    warm_up_sampling(runner.model.shape.vocab_size, runner.cache.device)


@torch.inference_mode()
def warm_up_sampling(vocab: int, device: torch.device) -> None:
    """Samples as requests may ask for it, from logits that say nothing."""
    reported = [[SamplingParams(max_tokens=1, temperature=0.0, logprobs=count)] for count in REPORTED]
    for params in (*SAMPLED, *reported):
        columns = SamplingColumns(len(params))
        for slot, each in enumerate(params):
            columns.enter(slot, each, seed=slot, num_prompt=1)
        slots = np.arange(len(params), dtype=np.int32)
        batch = columns.take(slots, np.full(len(params), 2, np.int32), lambda _: np.array([1, 2], np.int32))
        sample(torch.zeros(len(params), vocab, device=device), batch).wait()
