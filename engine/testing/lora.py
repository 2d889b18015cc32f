"""LoRAs with random matrices, in folders as PEFT writes them, for tests and experiments of every room."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from slipstream.engine.target.lora import PREFIX
from slipstream.engine.target.sources import LORA_CONFIG, LORA_TENSORS
from slipstream.kernels.adapter import ADAPTED, ADAPTED_MLP


def random_lora(
    shapes: Mapping[str, Sequence[int]],
    rank: int,
    seed: int = 0,
    size: float = 0.2,
    modules: Collection[str] = (*ADAPTED, *ADAPTED_MLP),
) -> dict[str, Tensor]:
    """A LoRA's tensors by PEFT's names, for those matrices among weights of these ``shapes`` that are ``modules``.

    A [rank, k] has deviation 1, B [n, rank] has ``size``: with 0.2 and more, answers of a tiny model are others.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for weight, shape in shapes.items():
        module = weight.removesuffix(".weight")
        if module.endswith(tuple(modules)) and len(shape) == 2:
            rows, columns = shape
            found[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            found[f"{PREFIX}{module}.lora_B.weight"] = size * torch.randn(rows, rank, generator=generator)
    return found


def write_lora(folder: Path, tensors: dict[str, Tensor], scale: float = 1.0, **config: Any) -> Path:
    """The folder, made or overwritten; ``config`` has further fields, and other values of those that there are."""
    downs = {name: tensor for name, tensor in tensors.items() if ".lora_A." in name}
    rank = min(map(len, downs.values()), default=1)
    modules = sorted({name.partition(".lora_A.")[0].rpartition(".")[2] for name in downs})
    described = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "target_modules": modules, "bias": "none"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LORA_CONFIG).write_text(json.dumps(described | config))
    save_file(tensors, folder / LORA_TENSORS)
    return folder
