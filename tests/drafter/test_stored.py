"""Heads read, checked and written without torch: the same as torch says of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

from slipstream.drafter.head import layout, stored
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import decoder_config
from slipstream.engine.testing.local import TINY_LLAMA

TARGET = TINY_LLAMA | {"num_hidden_layers": 8}
CONFIG = layout.config_for(decoder_config(TARGET), 48)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def kept(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, stored.Stored]:
    save_file(tensors, folder / "model.safetensors")
    return stored.read(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_published_file_is_the_one_torch_would_write(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = layout.random_tensors(CONFIG, 0)
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    found = kept(tmp_path, tensors | {"embed_tokens.weight": torch.zeros(96, 64)})
    data = stored.published(CONFIG, found)
    stored.check(CONFIG, found)
    assert data == save(layout.stored(tensors))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), st.integers(0, 2**32 - 1))
def test_numbers_are_rounded_as_torch_rounds_them(numbers: list[float], seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 0x7F7F8000, 100, dtype=np.uint32)  # of any size, up to the border
    values = np.concatenate([np.array(numbers, np.float32), bits.view(np.float32), -bits.view(np.float32)])
    ours = stored._round(values).view(np.int16)
    assert (ours == torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy()).all()


def with_value(name: str, value: Any) -> dict[str, torch.Tensor]:
    tensors = layout.random_tensors(CONFIG, 0)
    tensors[name].view(-1)[-1] = value
    return tensors


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fc.weight", float("inf"), "not finite"),
        ("norm.weight", float("nan"), "not finite"),
        ("d2t", 49, "outside the vocabulary"),
        ("d2t", -48, "outside the vocabulary"),
        ("d2t", 48, None),
    ],
)
def test_both_refuse_the_same(tmp_path: Path, dtype: torch.dtype, name: str, value: Any, message: str | None) -> None:
    tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in with_value(name, value).items()}
    for check in (lambda: layout.check(CONFIG, tensors), lambda: stored.check(CONFIG, kept(tmp_path, tensors))):
        if message is None:
            check()
        else:
            with pytest.raises(ModelError, match=message):
                check()


def test_how_far_a_tensor_moved(tmp_path: Path) -> None:
    before, after = (layout.stored(layout.random_tensors(CONFIG, seed)) for seed in (0, 1))
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    left, right = kept(tmp_path / "a", before), kept(tmp_path / "b", after)
    for name in CONFIG.shapes:
        a, b = before[name].double(), after[name].double()
        expected = ((b - a).norm() / a.norm()).item() if a.norm() else 0.0
        assert stored.change(left[name], right[name]) == pytest.approx(expected)
    assert stored.change(left["d2t"], right["t2d"]) is None


def test_a_file_that_says_what_it_does_not_hold(tmp_path: Path) -> None:
    data = bytearray(save({"a": torch.zeros(4, 4)}))
    data = data.replace(b"[4,4]", b"[4,5]")
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(ModelError, match=r"tensor 'a' has 64 bytes, which are not \[4, 5\] numbers of F32"):
        stored.read(tmp_path / "bad")
    (tmp_path / "odd").write_bytes(save({"a": torch.zeros(4, dtype=torch.float8_e4m3fn)}))
    with pytest.raises(ModelError, match="F8_E4M3"):
        stored.read(tmp_path / "odd")


COMMANDS = """
import sys
from pathlib import Path
from slipstream.drafter.registry.difference import compare
from slipstream.drafter.registry.exchange import export_version, import_head
from slipstream.drafter.registry.registry import Registry
from slipstream.engine.checkpoint import open_checkpoint

folder, target = Path(sys.argv[1]), open_checkpoint(sys.argv[2])
registry = Registry(folder / "registry")
one = import_head(registry, folder / "head", target).version
two = import_head(registry, registry.path(one), target).version
assert set(compare(registry, one, two).weights.values()) == {0.0}
export_version(registry, two, folder / "exported")
print("torch" in sys.modules)
"""


def test_registry_commands_need_no_torch(tmp_path: Path) -> None:
    tensors = layout.random_tensors(CONFIG, 0)
    layout.write(tmp_path / "head", CONFIG, tensors)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text(json.dumps(TARGET))
    save_file({"model.embed_tokens.weight": torch.zeros(96, 64)}, tmp_path / "target" / "model.safetensors")
    line = [sys.executable, "-P", "-c", COMMANDS, str(tmp_path), str(tmp_path / "target")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"
    written = load((tmp_path / "exported" / "model.safetensors").read_bytes())
    assert all(torch.equal(written[name], tensor) for name, tensor in layout.stored(tensors).items())
