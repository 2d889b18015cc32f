"""Quantised weights of safetensors files stand for the numbers that the tools which write them mean, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.models.loader import load_model
from slipstream.engine.testing.local import POLICY, policy
from slipstream.engine.testing.quantised import (
    KINDS,
    Parts,
    Whole,
    awq,
    bytes_of,
    compressed,
    four_bit_floats,
    gptq,
    rows_of_bytes,
    write_quantised,
)
from slipstream.kernels.native import library
from slipstream.kernels.native.quantised import StoredWeight

Q = "model.layers.0.self_attn.q_proj"


def opened(folder: Path, parts: Parts, scheme: dict[str, Any]) -> Any:
    """A checkpoint of a single matrix."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(POLICY | {"quantization_config": scheme}))
    save_file({f"{Q}.{name}": part.contiguous() for name, part in parts.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


@pytest.mark.parametrize("name", KINDS)
def test_numbers_are_those_that_are_meant(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    folder, expected = write_quantised(tmp_path / "model", policy(0), POLICY, kind)
    checkpoint = open_checkpoint(folder)
    found = dict(checkpoint.tensors())
    assert found.keys() == expected.keys()
    for tensor, numbers in expected.items():
        assert torch.equal(found[tensor].float(), numbers.float()), tensor
        assert checkpoint.tensor_shapes()[tensor] == tuple(numbers.shape)
    assert checkpoint.formats()[f"{Q}.weight"] == kind.format
    dense = checkpoint.weights_bytes(torch.bfloat16)
    assert dense == sum(2 * numbers.numel() for numbers in expected.values())


def any_whole(draw: Any, bits: int, symmetric: bool) -> Whole:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    n, blocks = 8 * draw(st.integers(1, 5)), draw(st.integers(1, 4))
    k, most = 32 * blocks, 1 << bits
    groups = draw(st.sampled_from([count for count in (1, 2, blocks, 4 * blocks) if k % count == 0]))
    zero = torch.full((n, groups), most // 2, dtype=torch.int32)
    if not symmetric:
        zero = torch.randint(0, most, (n, groups), generator=generator, dtype=torch.int32)
    size = draw(st.sampled_from([1e-5, 0.01, 3.0]))
    scale = (torch.randn(n, groups, generator=generator) * size).to(draw(st.sampled_from([torch.half, torch.bfloat16])))
    order = torch.randperm(k, generator=generator) if draw(st.booleans()) else torch.arange(k)
    q = torch.randint(0, most, (n, k), generator=generator, dtype=torch.int32)
    return Whole(bits, q, scale, zero, (order // (k // groups)).int())


@settings(max_examples=150, deadline=None)
@given(data=st.data(), bits=st.sampled_from([4, 8]), symmetric=st.booleans(), name=st.integers(0, 4))
def test_any_numbers_scales_and_zeros(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, bits: int, symmetric: bool, name: int
) -> None:
    """In whatever file they are, and by the compiled kernels if they stay packed."""
    whole = any_whole(data.draw, bits, symmetric)
    in_order = whole.__class__(bits, whole.q, whole.scale, whole.zero, whole.group.sort().values)
    ct, size = {"quant_method": "compressed-tensors"}, whole.q.shape[1] // whole.zero.shape[1]
    match name:
        case 0 | 1:
            scheme = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric}
            parts = gptq(whole, less_one=name == 0)
            scheme |= {"desc_act": True, "checkpoint_format": "gptq" if name == 0 else "gptq_v2"}
        case 2 if bits == 4:
            whole, scheme = in_order, {"quant_method": "awq", "bits": 4, "group_size": size}
            parts = awq(whole)
        case 3 if bits == 8:
            whole, scheme = in_order, ct | {"format": "int-quantized"}
            parts = bytes_of(whole, symmetric)
        case _:
            scheme = ct | {"format": "pack-quantized"}
            parts = compressed(whole, symmetric) | {"weight_g_idx": whole.group}
    checkpoint = opened(tmp_path_factory.mktemp("one"), parts, scheme)
    [(key, numbers)] = checkpoint.tensors()
    assert key == f"{Q}.weight" and torch.equal(numbers, whole.numbers)
    stored = checkpoint.stored(key)
    assert stored.format == checkpoint.formats()[key]
    if stored.format == "F32":
        assert torch.equal(torch.from_numpy(stored.data.view("<f4")), numbers)
    elif library.load() is not None:
        weight = StoredWeight(*numbers.shape, torch.bfloat16)
        weight.fill(stored)
        assert weight.is_quantised and torch.equal(weight.rows(torch.arange(len(numbers))), numbers)


def test_what_blocks_cannot_say_is_kept_as_numbers(tmp_path: Path) -> None:
    """Scales that are no float16, and groups that blocks of 32 inputs do not fit into."""

    def formed(name: str, scale: torch.Tensor, groups: int) -> str:
        k = 64
        q, zero = torch.full((8, k), 9, dtype=torch.int32), torch.full((8, groups), 8, dtype=torch.int32)
        whole = Whole(4, q, scale.expand(8, groups), zero, (torch.arange(k) // (k // groups)).int())
        found = opened(tmp_path / name, compressed(whole, True), {"quant_method": "compressed-tensors"})
        assert torch.equal(dict(found.tensors())[f"{Q}.weight"], whole.numbers)
        return str(found.formats()[f"{Q}.weight"])

    half = torch.tensor(0.5, dtype=torch.bfloat16)
    assert formed("fits", half, 2) == "INT4"
    assert formed("groups of 16", half, 4) == "F32"
    assert formed("small", half * 2**-24, 2) == "F32"
    assert formed("float32", torch.tensor(1 / 3), 2) == "F32"


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_of_bitsandbytes(tmp_path: Path, nested: bool) -> None:
    parts, numbers = four_bit_floats(torch.randn(16, 96), nested)
    checkpoint = opened(tmp_path, parts, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert torch.equal(dict(checkpoint.tensors())[f"{Q}.weight"], numbers)


def test_eight_bits_of_bitsandbytes(tmp_path: Path) -> None:
    parts, numbers = rows_of_bytes(torch.randn(16, 96))
    checkpoint = opened(tmp_path, parts, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert torch.equal(dict(checkpoint.tensors())[f"{Q}.weight"], numbers)


def test_what_is_beside_quantised_weights(tmp_path: Path) -> None:
    """Scales of activations and biases of nothing but zeros are left; other biases, and what was not quantised, count;
    an output matrix that is quantised is another one than the embedding."""
    scales = {f"{Q}.input_scale": torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(())}
    empty = {f"{Q}.bias": torch.zeros(64)}
    tied = POLICY | {"tie_word_embeddings": True}
    folder, _ = write_quantised(tmp_path / "model", policy(0), tied, KINDS["gptq-4"], scales | empty)
    tensors = load_file(folder / "model.safetensors")
    parts, numbers = KINDS["gptq-4"].quantise(tensors.pop("lm_head.weight"))
    tensors |= {f"lm_head.{name}": part for name, part in parts.items()}
    kept = policy(1)["model.layers.1.mlp.up_proj.weight"]
    for name in parts:
        del tensors[f"model.layers.1.mlp.up_proj.{name}"]
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": kept}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    found = dict(checkpoint.tensors())
    assert found.keys() == policy(0).keys() and checkpoint.config["tie_word_embeddings"] is False
    assert torch.equal(found["lm_head.weight"], numbers)
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], kept)
    tensors[f"{Q}.bias"][3] = 1
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": kept}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{Q}.bias.*does not have"):
        load_model(EngineConfig(model=str(folder), kernels="torch"))


def test_the_configuration_may_lie_beside(tmp_path: Path) -> None:
    folder, expected = write_quantised(tmp_path / "model", policy(0), POLICY, KINDS["gptq-4"])
    (folder / "config.json").write_text(json.dumps(POLICY))
    told = {key: value for key, value in KINDS["gptq-4"].config.items() if key != "quant_method"}
    (folder / "quantize_config.json").write_text(json.dumps(told))
    assert torch.equal(dict(open_checkpoint(folder).tensors())[f"{Q}.weight"], expected[f"{Q}.weight"])


def test_zeros_of_either_version_are_known_where_they_say_nothing(tmp_path: Path) -> None:
    """Exporters mix up versions; in symmetric models it does not matter."""
    for version in ("gptq", "gptq_v2"):
        scheme = KINDS["gptq-4"].config | {"checkpoint_format": version}
        parts, numbers = KINDS["gptq-4"].quantise(torch.randn(16, 64))
        checkpoint = opened(tmp_path / version, parts, scheme)
        assert torch.equal(dict(checkpoint.tensors())[f"{Q}.weight"], numbers)


def drop(name: str) -> Callable[[Parts], Any]:
    return lambda parts: parts.pop(name)


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Parts], Any]:
    return lambda parts: parts.update({name: make(parts[name])})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gptq-4", drop("scales"), r"lacks '.*q_proj.scales', which '.*q_proj.\w+' needs"),
        ("gptq-4", drop("qweight"), r"lacks '.*q_proj.qweight'"),
        ("gptq-4-act-order", drop("g_idx"), r"lacks '.*q_proj.g_idx', which desc_act needs"),
        ("gptq-4", put("scales", lambda t: t[:, :-8]), r"q_proj.scales' has shape \[2, 56\]"),
        ("gptq-4", put("qzeros", lambda t: t[:1]), r"q_proj.qzeros' has shape"),
        ("gptq-4", put("qzeros", lambda t: t[:, :6]), r"q_proj.qweight' has numbers of 3 bits"),
        ("gptq-4", put("qweight", lambda t: t.to(torch.int16)), r"q_proj.qweight' has the format I16, I32 is needed"),
        ("gptq-4", put("g_idx", lambda t: t[:-1]), r"q_proj.g_idx' has shape"),
        ("gptq-4", put("g_idx", lambda t: t + 1), r"q_proj.g_idx' names groups that there are not"),
        ("gptq-4", put("scales", lambda t: t * torch.inf), r"q_proj.scales' has numbers that are not finite"),
        ("awq", put("qzeros", lambda t: t[:, :-1]), r"q_proj.qzeros' has shape"),
        ("awq", put("scales", lambda t: t[:, :-8]), r"q_proj.scales' has shape"),
        ("w4a16", drop("weight_shape"), r"lacks '.*q_proj.weight_shape'"),
        ("w4a16", put("weight_packed", lambda t: t[:, :-2]), r"q_proj.weight_packed' has shape \[64, 6\]"),
        ("w4a16-asymmetric", put("weight_zero_point", lambda t: t[:-1]), r"q_proj.weight_zero_point' has shape"),
        ("w8a8", put("weight_scale", lambda t: t[:-1]), r"q_proj.weight_scale' has shape"),
        ("awq", lambda parts: parts.update(weight=torch.ones(64, 64)), r"q_proj.weight' both as numbers and quantised"),
        ("fp8", drop("weight_scale"), r"lacks '.*q_proj.weight_scale'"),
        ("fp8-blocks", put("weight_scale_inv", lambda t: t[:-1]), r"q_proj.weight_scale_inv' has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, kind: str, change: Any, message: str) -> None:
    parts, _ = KINDS[kind].quantise(torch.randn(64, 64))
    change(parts)
    checkpoint = opened(tmp_path, parts, KINDS[kind].config)
    with pytest.raises(ModelError, match=message):
        checkpoint.formats()
        list(checkpoint.tensors())


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"quant_method": "gptq", "bits": 3}, r"\(gptq, 3 bits\).*serve GPTQ of 4 or 8 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "format 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'.*serve AWQ of 4 bits"),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, "auto-round"),
        ({"quant_method": "mxfp4"}, r"\(mxfp4\).*GGUF"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"\(modelopt, NVFP4\)"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"num_bits": 3}}}},
            "int of 3 bits.*int of 4 or 8 bits",
        ),
        ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"r": {}}}}, "transforms"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "many"}, "not what its quant_method has"),
        ("gptq", r"quantised \(gptq\)"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_before_anything_is(tmp_path: Path, scheme: Any, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(POLICY | {"quantization_config": scheme}))
    with pytest.raises(ModelError, match=message):
        load_model(EngineConfig(model=str(tmp_path)))
