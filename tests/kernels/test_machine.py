"""What the machine is asked about itself."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from slipstream.kernels import machine


@pytest.fixture(autouse=True)
def _ask_anew() -> Iterator[None]:
    machine.fast_dtype.cache_clear()
    yield
    machine.fast_dtype.cache_clear()


def chosen(monkeypatch: pytest.MonkeyPatch, float32: float, bfloat16: float) -> torch.dtype:
    speeds = {torch.float32: float32, torch.bfloat16: bfloat16}
    monkeypatch.setattr(machine, "matmul_flops", speeds.__getitem__)
    return machine.fast_dtype(torch.device("cpu"))


def test_the_faster_format_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, 330e9, 62e9) is torch.float32


def test_bfloat16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, 200e9, 700e9) is torch.bfloat16


def test_the_exact_format_where_both_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, 100e9, 105e9) is torch.float32


def test_a_gpu_computes_in_bfloat16() -> None:
    assert machine.fast_dtype(torch.device("cuda")) is torch.bfloat16


def test_speed_is_measured() -> None:
    assert machine.matmul_flops(torch.float32) > 1e6


def test_time_in_which_others_compute_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training worker has the lowest priority: beside requests it waits more than it computes."""
    product = torch.nn.functional.linear

    def interrupted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        time.sleep(0.5)
        return product(x, weight)

    machine.matmul_flops.cache_clear()
    monkeypatch.setattr(torch.nn.functional, "linear", interrupted)
    operations = 2 * machine.ROWS * machine.WIDTH * machine.WIDTH
    assert machine.matmul_flops(torch.float32) > operations / 0.25
    machine.matmul_flops.cache_clear()
