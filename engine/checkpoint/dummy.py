"""Random weights in the shapes of a model configuration, for ``--load-format dummy``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from slipstream.engine.checkpoint.shapes import parameter_shapes

INIT_STD = 0.02
CPU = torch.device("cpu")


def dummy_tensors(config: dict[str, Any], seed: int, device: torch.device = CPU) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, float32 tensor) pairs: norms are ones, biases zeros, the rest normal with deviation 0.02.

    Every tensor depends only on the seed, its name and shape, and the kind of device, not on the order they are made
    in. They are made on the device, since billions of random numbers take a CPU minutes.
    """
    for name, shape in parameter_shapes(config):
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, device=device)
        elif name.endswith(".bias"):
            yield name, torch.zeros(shape, device=device)
        else:
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
            yield name, torch.empty(shape, device=device).normal_(0.0, INIT_STD, generator=generator)
