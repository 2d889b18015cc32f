"""Weights, arithmetic and cache each have a format of their own; one more for weights is a class and a line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.models.config import decoder_config
from slipstream.engine.models.decoder import Decoder
from slipstream.engine.models.weights import load
from slipstream.engine.testing.local import TINY_LLAMA
from slipstream.kernels import torch_stack
from slipstream.kernels.batch import make_batch
from slipstream.kernels.compute import Formats
from slipstream.kernels.torch_stack import TorchCompute

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16


class Int8Weight:
    """Rows of bytes with a scale each, as somebody would add quantised weights; computed with in float32."""

    def __init__(self, n: int, k: int, device: torch.device, bias: bool) -> None:
        self.n, self.k = n, k
        self._bytes = torch.zeros(n, k, dtype=torch.int8, device=device)
        self._scales = torch.zeros(n, device=device)
        self._bias = torch.zeros(n if bias else 0, device=device)

    @property
    def num_bytes(self) -> int:
        return self._bytes.nbytes + self._scales.nbytes + self._bias.nbytes

    def fill(self, rows: Tensor, first_row: int = 0) -> None:
        scales = rows.float().abs().amax(1).clamp(min=1e-12) / 127
        self._bytes[first_row : first_row + len(rows)] = (rows.float() / scales[:, None]).round().to(torch.int8)
        self._scales[first_row : first_row + len(rows)] = scales

    def fill_bias(self, values: Tensor, first_row: int = 0) -> None:
        self._bias[first_row : first_row + len(values)] = values.float()

    def rows(self, indices: Tensor) -> Tensor:
        return self._bytes[indices].float() * self._scales[indices, None]

    def __call__(self, x: Tensor) -> Tensor:
        out = (x.float() @ self._bytes.float().T) * self._scales
        return (out + self._bias if len(self._bias) else out).to(x.dtype)


@torch.inference_mode()
def hidden(formats: Formats) -> tuple[Tensor, int]:
    """Hidden states of 40 tokens in two steps; and the bytes of the cache."""
    model = Decoder(decoder_config(TINY_LLAMA), TorchCompute(formats, CPU), 64)
    load(model, dummy_tensors(TINY_LLAMA, 0))
    cache = model.new_cache(4, 16)
    ids = np.random.default_rng(0).integers(0, 96, 40).astype(np.int32)
    found = []
    for begin, end in ((0, 30), (30, 40)):
        counts, ends = np.array([end - begin], np.int32), np.array([end], np.int32)
        table, row = np.arange(4, dtype=np.int32)[None], np.zeros(1, np.int32)
        found.append(model.forward(make_batch(ids[begin:end], counts, ends, table, row, 16), cache).hidden)
    return torch.cat(found), cache.num_bytes


def test_quantised_weights_are_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_stack.WEIGHTS, "int8", Int8Weight)
    exact, _ = hidden(Formats.of(F32))
    found, _ = hidden(Formats("int8", F32, F32))
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < 0.03


def test_the_cache_has_a_format_of_its_own() -> None:
    exact, whole = hidden(Formats.of(F32))
    found, half = hidden(Formats("float32", F32, BF16))
    assert half == whole / 2
    assert found.dtype is F32
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < 0.01


def test_weights_have_a_format_of_their_own() -> None:
    exact, _ = hidden(Formats.of(F32))
    found, _ = hidden(Formats("bfloat16", F32, F32))
    assert found.dtype is F32
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < 0.03
