"""How tests call /generate, and how trainers share tensors."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

PROMPT = [504, 2632, 6354, 16438, 28]
TEXT = "The quick brown fox"


def generate(server: Any, prompt: Any = None, **fields: Any) -> Any:
    """``prompt`` as ids unless it is a text; sampling parameters by their names, other fields by theirs."""
    sampling = {"max_new_tokens": 8, "temperature": 0, **fields.pop("sampling", {})}
    prompt = PROMPT if prompt is None else prompt
    first = prompt[0] if isinstance(prompt, list) else prompt
    name = "text" if isinstance(first, str) else "input_ids"
    body = {name: prompt, "sampling_params": sampling, **fields}
    status, answer = server.post("/generate", body)
    assert status == 200, answer
    return answer


def refused(server: Any, **body: Any) -> Any:
    status, answer = server.post("/generate", {"input_ids": PROMPT, **body})
    assert status == 400, answer
    return answer["error"]


@dataclass
class FlattenedTensorMetadata:
    """What lies where in a bucket, as SGLang pickles it: only the name of the class is known to who reads it."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


def flattened(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A bucket: the bytes of all tensors, and what lies where in them."""
    parts, metadata, at = [], [], 0
    for name, tensor in tensors.items():
        part = tensor.flatten().view(torch.uint8)
        metadata.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, at, at + len(part), len(part)))
        parts.append(part)
        at += len(part)
    return {"flattened_tensor": torch.cat(parts), "metadata": metadata}


def shared(value: Any) -> str:
    """Pickled as processes of one machine share tensors, in base64, as trainers send it."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        pickled = BytesIO()
        ForkingPickler(pickled).dump(value)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    return base64.b64encode(pickled.getvalue()).decode()
