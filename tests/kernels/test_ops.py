"""Backends of operations: each computes what the reference does, and one is a class and a line in the table."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slipstream.kernels import ops
from slipstream.kernels.reference import ReferenceOps
from slipstream.kernels.triton import launch

PLAIN = ReferenceOps()


class FusedNorms(ops.BACKENDS[0]):  # type: ignore[misc]
    """One more backend, as somebody would add it: torch's fused kernel for one operation, the rest as before."""

    name = "fused"
    calls = 0

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        return device.type == "cpu"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        FusedNorms.calls += 1
        with torch.no_grad():  # as compiled code is, which has no gradient
            return torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def test_the_table_ends_with_what_runs_everywhere() -> None:
    assert ops.BACKENDS[-1] is ReferenceOps
    assert ops._for_device(torch.device("meta")).name == "reference"


@pytest.fixture(scope="module", autouse=True)
def fused() -> Iterator[None]:
    """All that it takes: a line in the table."""
    ops.BACKENDS.insert(0, FusedNorms)
    ops._for_device.cache_clear()
    yield
    ops.BACKENDS.remove(FusedNorms)
    ops._for_device.cache_clear()


def arguments(rows: int, width: int, dtype: torch.dtype, seed: int) -> dict[str, tuple[Any, ...]]:
    """What to call each operation with; made anew for every call, since some overwrite what they get."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def share() -> Tensor:
        return torch.rand(rows, generator=generator)

    angles = torch.rand(rows, 8, generator=generator)
    logits = torch.randn(rows, width, generator=generator)
    tokens = torch.arange(0, width, 3)
    return {
        "rms_norm": (some(rows, width), some(width), 1e-5),
        "rms_norm_plus_one": (some(rows, width), some(width), 1e-5),
        "gelu_tanh_mul": (some(rows, width), some(rows, width)),
        "experts": (some(rows, width), some(rows, 3), some(3, 10, width) * 0.3, some(3, width, 5) * 0.3, 2, True),
        "rope": (some(rows, 3, 16), angles.cos(), angles.sin()),
        "silu_mul": (some(rows, width), some(rows, width)),
        "linear": (some(rows, width), some(5, width), some(5)),
        "embedding": (torch.arange(rows) % 5, some(5, width)),
        "argmax": (logits,),
        "argmax_with_probability": (logits,),
        "distribution": (logits, share() + 0.5, torch.full((rows,), 0, dtype=torch.int32), share() * 0.1, share()),
        "race": (logits.exp(), torch.arange(rows) + seed, torch.arange(rows) * 3, 2, torch.arange(width).int() * 5),
        "change_logits": (
            *(logits, torch.tensor([rows - 1]).int(), torch.zeros(len(tokens)).int(), tokens.int()),
            *(torch.randn(len(tokens), generator=generator), (torch.arange(len(tokens)) % 4 - 1).int()),
            *(torch.tensor([1.3]), torch.tensor([0.2]), torch.tensor([0.1])),
        ),
        "allow_only": (logits, torch.tensor([*[0] * rows, len(tokens)]).int(), tokens.int()),
        "log_probabilities": (logits, torch.arange(rows).int() % width, 3),
    }


def operations() -> set[str]:
    return {name for name in vars(ReferenceOps) if not name.startswith("_")} - {"name", "runs_on"}


@settings(max_examples=40)
@given(
    backend=st.sampled_from(["fused", *ops.backend_names(), *(["triton"] if launch.runs_on("cpu") else [])]),
    rows=st.integers(1, 6),
    width=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_every_backend_computes_what_the_reference_does(
    backend: str, rows: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    assert set(arguments(1, 1, dtype, 0)) == operations(), "an operation that is not held against the reference"
    for name in operations():
        operation: Callable[..., Any] = getattr(ops, name)
        given, expected = arguments(rows, width, dtype, seed)[name], arguments(rows, width, dtype, seed)[name]
        with ops.use_backend(backend):
            found = operation(*given)
        wanted = getattr(PLAIN, name)(*expected)
        if name in ("change_logits", "allow_only"):
            found, wanted = given[0], expected[0]
        if name == "distribution":  # up to a factor; a token on the border may go either way, see test_sampling
            found, wanted = found / found.sum(-1, keepdim=True), wanted / wanted.sum(-1, keepdim=True)
            if not torch.equal(found > 0, wanted > 0):
                continue
        torch.testing.assert_close(found, wanted, rtol=1.6e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-5)


def test_the_cpu_never_gets_triton() -> None:
    """Even where its interpreter runs; a process that computes on the CPU does not import it either."""
    check = (
        "import sys, torch; from slipstream.kernels import ops;"
        "print(ops._for_device(torch.device('cpu')).name, 'triton' in sys.modules)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True)
    name, is_imported = done.stdout.split()
    assert name != "triton" and is_imported == "False"


def test_a_device_gets_the_first_backend_that_runs_on_it() -> None:
    before = FusedNorms.calls
    ops.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)
    assert FusedNorms.calls == before + 1
    assert ops.backend_names()[0] == "fused"


def test_a_test_chooses_the_backend_in_all_threads() -> None:
    found: list[Tensor] = []

    def work() -> None:
        found.append(ops.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5))

    before = FusedNorms.calls
    with ops.use_backend("reference"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(found) == 1 and FusedNorms.calls == before
    work()
    assert FusedNorms.calls == before + 1
    with pytest.raises(ValueError, match="no backend 'cuda-magic'; there are fused"), ops.use_backend("cuda-magic"):
        pass


@pytest.mark.parametrize("wanted", [0, 1])
def test_where_a_gradient_is_wanted_operations_have_one(wanted: int) -> None:
    operands = [torch.randn(3, 8), torch.randn(8)]
    operands[wanted].requires_grad_(True)
    ops.rms_norm(operands[0], operands[1], 1e-5).sum().backward()
    assert operands[wanted].grad is not None
    before = FusedNorms.calls
    with torch.inference_mode():
        ops.rms_norm(operands[0], operands[1], 1e-5)
    assert FusedNorms.calls == before + 1
