"""Which backend computes attention: what is chosen covers what is wanted, and every reason against it is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.kernels.attention import choice
from slipstream.kernels.attention.choice import TABLE, NoAttentionError, Wanted, against, choose

FORMATS = [torch.float32, torch.float16, torch.bfloat16]
NAMES = [entry.name for entry in TABLE]
HOPPER = Wanted(torch.device("cuda"), 90, 128, torch.bfloat16, torch.bfloat16)
wanted = st.builds(
    Wanted,
    device=st.sampled_from([torch.device("cuda"), torch.device("cpu")]),
    capability=st.sampled_from([0, 75, 80, 90, 100, 120]),
    head_dim=st.sampled_from([16, 64, 80, 96, 128, 256, 512, 33]),
    dtype=st.sampled_from(FORMATS),
    kv_dtype=st.sampled_from([*FORMATS, torch.float8_e4m3fn]),
    window=st.booleans(),
    softcap=st.booleans(),
    sinks=st.booleans(),
    deterministic=st.booleans(),
)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Backends that are installed."""
    names = set(NAMES)
    here(monkeypatch, names)
    return names


def here(patch: pytest.MonkeyPatch, names: set[str]) -> None:
    for name in ("missing", "absent"):
        patch.setattr(choice, name, lambda name: "" if name in names else f"{name} is not installed")
    patch.setattr(choice.launch, "runs_on", lambda kind: kind == "cuda")


@given(wanted=wanted, asked=st.sampled_from(["auto", *NAMES]), names=st.sets(st.sampled_from(NAMES)))
def test_what_is_chosen_is_there_and_covers_what_is_wanted(wanted: Wanted, asked: str, names: set[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        here(patch, names)
        possible = {name for name in names if not against(name, wanted)}
        if asked in possible or (asked == "auto" and possible):
            made = choose(wanted, asked)
            assert made.name in possible and asked in ("auto", made.name)
            assert set(made.others) == set(NAMES) - {made.name} and all(made.others.values())
        else:
            with pytest.raises(NoAttentionError):
                choose(wanted, asked)


def test_an_order_of_the_table_is_followed(there: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was measured is a line of the table; auto falls back along it."""
    measured = choice.Preference(90, 99, ("flashinfer", "xformers", "triton", "torch"), "measured on an H100")
    monkeypatch.setattr(choice, "PREFERENCES", (measured, *choice.PREFERENCES))
    assert (choose(HOPPER).name, choose(HOPPER).because) == ("flashinfer", "measured on an H100")
    assert choose(replace(HOPPER, capability=80)).name == "triton"
    there.discard("flashinfer")
    assert choose(HOPPER).name == "xformers" and choose(HOPPER).others["flashinfer"] == "flashinfer is not installed"
    assert choose(replace(HOPPER, window=True)).name == "triton"
    assert choose(replace(HOPPER, deterministic=True)).name == "triton"


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("flashinfer", {"capability": 75}, "8.0"),
        ("flashinfer", {"head_dim": 80}, "64, 128 and 256"),
        ("flashinfer", {"sinks": True}, "sinks"),
        ("flashinfer", {"dtype": torch.float32, "kv_dtype": torch.float32}, "one format"),
        ("xformers", {"window": True}, "window"),
        ("xformers", {"softcap": True}, "soft cap"),
        ("xformers", {"kv_dtype": torch.float8_e4m3fn}, "8-bit"),
        ("torch", {"deterministic": True}, "cut into steps"),
        ("triton", {"device": torch.device("cpu")}, "Triton runs no kernels"),
    ],
)
def test_what_cannot_be_used_is_said_when_it_is_asked_for(
    there: set[str], name: str, changed: dict[str, Any], said: str
) -> None:
    assert choose(HOPPER, name).name == name
    with pytest.raises(NoAttentionError, match=f"--attention-backend {name}.*{said}"):
        choose(replace(HOPPER, **changed), name)


def test_one_that_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    for name in ("flashinfer", "xformers"):
        with pytest.raises(
            NoAttentionError, match=rf"^--attention-backend {name}: {name} is not installed: pip install"
        ):
            choose(HOPPER, name)


def test_one_that_is_broken_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for another CUDA fails when it is imported."""
    choice.backend.cache_clear()
    monkeypatch.setattr(choice, "find_spec", lambda name: True)

    def broken(name: str) -> Any:
        raise OSError("libcudart.so.12: cannot open shared object file")

    for module in ("flashinfer", "xformers"):
        monkeypatch.setattr(f"slipstream.kernels.attention.{module}.import_module", broken)
        assert choice.missing(module).endswith("does not start: libcudart.so.12: cannot open shared object file")


def test_what_is_not_chosen_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing FlashInfer and xFormers takes seconds each."""
    monkeypatch.setattr(choice.launch, "runs_on", lambda kind: kind == "cuda")
    monkeypatch.setattr(choice, "find_spec", lambda name: True)
    imported: list[str] = []
    monkeypatch.setattr(choice, "backend", imported.append)
    assert choose(HOPPER).name == "triton" and imported == ["triton"]
    assert choose(HOPPER, "xformers").name == "xformers" and imported[1:] == ["xformers"]
