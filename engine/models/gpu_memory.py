"""How much of a GPU's memory there is for a cache: what this process may use, less what a step is seen to take."""

from __future__ import annotations

import numpy as np
import torch

from slipstream.engine.models.config import DecoderConfig
from slipstream.engine.models.protocol import CausalModel
from slipstream.kernels.batch import make_batch

MOST_PENDING = 512
"""Positions per request whose hidden states wait for a head while nobody asks it; older ones are left out."""
PENDING_ROOM = 2
"""What keeps them takes so many times as much at most: until others are left out, they are parts of larger pieces."""
HEAD_TAPS, HEAD_VOCAB, HEAD_VERSIONS = 3, 1 << 15, 2
"""What a head has mostly, layers that it reads and tokens that it drafts; and how many versions lie in memory."""


def has_own_memory(device: torch.device) -> bool:
    """Whether the device's memory is its own, and all of it may be used."""
    return device.type == "cuda"


def budget(device: torch.device, utilization: float) -> int:
    """Bytes that this process may take: what is free, less the share of the whole that is to stay so."""
    free, total = torch.cuda.mem_get_info(device)
    return int(free - (1 - utilization) * total)


def head_bytes(target: DecoderConfig, dtype: torch.dtype) -> int:
    """What the weights of a head take."""
    hidden, vocab = target.hidden, min(target.shape.vocab_size, HEAD_VOCAB)
    q, kv = (count * target.shape.head_dim for count in (target.heads, target.shape.kv_heads))
    layer = 2 * hidden * (q + 2 * kv) + q * hidden + 3 * hidden * target.intermediate
    return HEAD_VERSIONS * (layer + HEAD_TAPS * hidden * hidden + vocab * hidden) * dtype.itemsize


def pending_bytes(target: DecoderConfig, dtype: torch.dtype) -> int:
    """What a position takes whose hidden states wait for a head."""
    return PENDING_ROOM * HEAD_TAPS * target.hidden * dtype.itemsize


@torch.inference_mode()
def step_bytes(
    model: CausalModel, device: torch.device, tokens: int, rows: int, max_model_len: int, block_size: int
) -> int:
    """Memory that a step of so many tokens takes while it runs, besides weights and cache, seen in one.

    It computes logits after ``rows`` of the tokens, and a distribution from them.
    """
    counts = [min(max_model_len, tokens - begin) for begin in range(0, tokens, max_model_len)]
    blocks = -(-counts[0] // block_size)
    cache = model.new_cache(blocks, block_size)  # for all segments: what comes of them is of no interest
    tables = np.broadcast_to(np.arange(blocks, dtype=np.int32), (len(counts), blocks)).copy()
    lengths, which = np.array(counts, np.int32), np.arange(len(counts), dtype=np.int32)
    batch = make_batch(np.zeros(tokens, np.int32), lengths, lengths, tables, which, block_size)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    hidden = model.forward(batch, cache).hidden
    model.logits(hidden, np.arange(min(rows, tokens), dtype=np.int32)).softmax(-1).argmax(-1)
    taken = torch.cuda.max_memory_allocated(device) - before
    del cache, hidden
    torch.cuda.empty_cache()
    return int(taken)
