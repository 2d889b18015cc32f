"""Quantised folders that are damaged, or say what is unusual: their numbers are those that are meant, or one sentence
says what is wrong."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.models.loader import load_model
from slipstream.engine.testing.local import POLICY
from slipstream.engine.testing.quantised import KINDS, Parts, compressed, four_bit_floats, gptq, quantise, rows_of_bytes

Q = "model.layers.0.self_attn.q_proj"
NF4, LLM_INT8 = ({"quant_method": "bitsandbytes", f"load_in_{bits}bit": True} for bits in (4, 8))
STATE = "weight.quant_state.bitsandbytes__nf4"
MOST_MEMORY = 4 << 20


def written(folder: Path, parts: Parts, scheme: Any, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(POLICY | {"quantization_config": scheme} | settings))
    save_file({f"{Q}.{name}": part.contiguous() for name, part in parts.items()}, folder / "model.safetensors")
    return folder


def numbers(folder: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    stored = checkpoint.stored(f"{Q}.weight")
    assert stored.format == checkpoint.formats()[f"{Q}.weight"]
    return dict(checkpoint.tensors())[f"{Q}.weight"]


def made() -> dict[str, tuple[dict[str, Any], Parts]]:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    kinds = {name: (kind.config, kind.quantise(weight)[0]) for name, kind in KINDS.items()}
    kinds |= {f"nf4-{nested}": (NF4, four_bit_floats(weight, nested)[0]) for nested in (False, True)}
    return kinds | {"int8": (LLM_INT8, rows_of_bytes(weight)[0])}


MADE = made()
ODD = st.sampled_from(
    [None, 0, -1, 1, 16, 64, 2**40, 3.5, "4", "", "gemm", "true", True, [], [0, 0], [2**40, 2**40], {}]
)


@st.composite
def headers(draw: Any, header: dict[str, Any]) -> dict[str, Any]:
    """The header of a safetensors file with one or two wrong entries."""
    changed: dict[str, Any] = json.loads(json.dumps(header))
    for _ in range(draw(st.integers(1, 2))):
        entry = changed[draw(st.sampled_from(sorted(changed)))]
        match draw(st.sampled_from(["shape", "dtype", "data_offsets", "name"])):
            case "shape":
                entry["shape"] = draw(st.lists(st.sampled_from([0, 1, 2, 4, 32, 64, 2**40]), max_size=4))
            case "dtype":
                entry["dtype"] = draw(
                    st.sampled_from(["I8", "U8", "I32", "I64", "F16", "BF16", "F32", "F4", "F8_E4M3", ""])
                )
            case "data_offsets":
                begin, end = entry["data_offsets"]
                entry["data_offsets"] = [begin + draw(st.integers(-2, 2)), end + draw(st.integers(-2, 2))]
            case "name":
                changed[f"{Q}.{draw(st.sampled_from(['weight', 'scales', 'weight_scale', 'g_idx', 'SCB', 'x']))}"] = (
                    entry
                )
    return changed


@settings(max_examples=100)
@given(data=st.data(), name=st.sampled_from(sorted(MADE)))
def test_whatever_a_header_says(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str) -> None:
    """It is read, or a ModelError tells, without much memory."""
    folder = tmp_path_factory.getbasetemp() / "header"
    scheme, parts = MADE[name]
    written(folder, parts, scheme)
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(data.draw(headers(json.loads(content[8:end])))).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    read_or_told(folder)


@settings(max_examples=100)
@given(data=st.data(), name=st.sampled_from(sorted(MADE)))
def test_whatever_is_said_of_quantised_weights(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    scheme, parts = MADE[name]
    scheme = json.loads(json.dumps(scheme))
    key = data.draw(
        st.sampled_from([*scheme, "group_size", "version", "weight_block_size", "format", "sparsity_config"])
    )
    scheme[key] = data.draw(ODD)
    for group in scheme["config_groups"].values() if isinstance(scheme.get("config_groups"), dict) else ():
        inner = data.draw(st.sampled_from([*group["weights"], "block_structure"]))
        group["weights"][inner] = data.draw(ODD)
    folder = tmp_path_factory.getbasetemp() / "scheme"
    parts = dict(parts)
    if name.startswith("nf4"):
        state = json.loads(bytes(parts[STATE].tolist()))
        state[data.draw(st.sampled_from(sorted(state)))] = data.draw(ODD)
        parts[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    read_or_told(written(folder, parts, scheme))


def read_or_told(folder: Path) -> None:
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(folder)
        for name, _ in checkpoint.packed_tensors(lambda kind, n, k: True):
            checkpoint.stored(name)
        for _, tensor in checkpoint.tensors():
            assert tensor.numel() <= 1 << 16
            tensor.float().sum()
    except ModelError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_MEMORY


def test_tensors_that_lie_in_the_same_bytes_are_told(tmp_path: Path) -> None:
    scheme, parts = MADE["gptq-4"]
    content = (written(tmp_path, parts, scheme) / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    begin, last = header[f"{Q}.scales"]["data_offsets"]
    header[f"{Q}.qzeros"] |= {"data_offsets": [begin, last], "shape": [(last - begin) // 4]}
    changed = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(changed).to_bytes(8, "little") + changed + content[end:])
    with pytest.raises(ModelError, match=r"q_proj.\w+' and '.*q_proj.\w+' lie in the same bytes"):
        numbers(tmp_path)


def test_sizes_that_are_beyond_a_matrix_take_no_memory(tmp_path: Path) -> None:
    """torch's memory is none that the fuzz test sees."""
    weight = torch.randn(4, 64)
    parts, expected = KINDS["fp8"].quantise(weight)
    parts["weight_scale"] = parts["weight_scale"].view(1, 1)
    scheme = {"quant_method": "fp8", "weight_block_size": [2**50, 2**50]}
    assert torch.equal(numbers(written(tmp_path, parts, scheme)), expected)
    parts, expected = four_bit_floats(weight, nested=False, block=256)
    state = json.loads(bytes(parts[STATE].tolist())) | {"blocksize": 2**50}
    parts[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    assert torch.equal(numbers(written(tmp_path, parts, NF4)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_bitsandbytes_may_be_stored_as_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    """bnb_4bit_quant_storage."""
    parts, expected = four_bit_floats(torch.randn(16, 96), nested=True)
    parts["weight"] = parts["weight"].view(-1).view(dtype).view(-1, 1)
    assert torch.equal(numbers(written(tmp_path, parts, NF4)), expected)


def test_fp8_by_groups(tmp_path: Path) -> None:
    weight = torch.randn(16, 96)
    stored, scales = weight.to(torch.float8_e4m3fn), torch.rand(16, 3)
    scheme = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    parts = {"weight": stored, "weight_scale": scales, "weight_zero_point": torch.zeros(16, 3)}
    found = numbers(written(tmp_path, parts, scheme))
    assert torch.equal(found, stored.float() * scales.repeat_interleave(32, 1))


def test_modules_may_have_groups_of_another_size(tmp_path: Path) -> None:
    """``dynamic`` of GPTQModel, ``extra_config`` of AutoRound: numbers of groups say it where there is no g_idx."""
    whole = quantise(torch.randn(16, 128), 4, 64, symmetric=True)
    scheme = {"quant_method": "gptq", "bits": 4, "dynamic": {r".*q_proj": {"group_size": 64}}}
    for stated in (32, 128, -1, 2**40):
        folder = written(tmp_path, gptq(whole, with_order=False), scheme | {"group_size": stated})
        assert torch.equal(numbers(folder), whole.numbers)


def test_groups_without_an_order_are_in_order(tmp_path: Path) -> None:
    """compressed-tensors leaves -1 where an order was announced and none was needed."""
    whole = quantise(torch.randn(16, 128), 4, 32, symmetric=True, scales=torch.bfloat16)
    parts = compressed(whole, True) | {"weight_g_idx": torch.full((128,), -1, dtype=torch.int32)}
    assert torch.equal(numbers(written(tmp_path, parts, KINDS["w4a16"].config)), whole.numbers)


def test_modelopt_writes_a_file_of_its_own(tmp_path: Path) -> None:
    parts, expected = KINDS["fp8"].quantise(torch.randn(16, 64))
    folder = written(tmp_path, parts | {"input_scale": torch.ones(())}, None)
    told: dict[str, Any] = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(told))
    assert torch.equal(numbers(folder), expected)
    told["quantization"]["quant_algo"] = "NVFP4"
    (folder / "hf_quant_config.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match=r"\(modelopt, NVFP4\)"):
        numbers(folder)


Change = Callable[[Parts], Any]


def put(name: str, value: torch.Tensor) -> Change:
    return lambda parts: parts.update({name: value})


@pytest.mark.parametrize(
    ("parts", "scheme", "change", "message"),
    [
        (rows_of_bytes, LLM_INT8, lambda parts: parts.pop("SCB"), r"lacks '.*q_proj.SCB'"),
        (rows_of_bytes, LLM_INT8, put("weight_format", torch.ones(())), "another order than by rows"),
        (
            lambda w: four_bit_floats(w, True),
            NF4,
            put("weight.nested_absmax", torch.ones(2)),
            r"nested_absmax' has shape",
        ),
        (
            lambda w: four_bit_floats(w, True),
            NF4,
            put("weight.nested_quant_map", torch.ones(9)),
            "quant_map' has shape",
        ),
        (
            KINDS["w8a8-asymmetric"].quantise,
            KINDS["w8a8-asymmetric"].config,
            lambda parts: parts.pop("weight_zero_point"),
            r"lacks '.*q_proj.weight_zero_point'",
        ),
        (
            KINDS["fp8"].quantise,
            KINDS["fp8"].config,
            put("weight", torch.ones(16, 64)),
            "before its weights were quant",
        ),
        (KINDS["fp8"].quantise, KINDS["fp8"].config, put("weight_zero_point", torch.ones(1)), "zero_point' is not 0"),
    ],
)
def test_what_is_missing_or_strange_is_named(
    tmp_path: Path, parts: Any, scheme: dict[str, Any], change: Change, message: str
) -> None:
    made, _ = parts(torch.randn(16, 64))
    change(made)
    with pytest.raises(ModelError, match=message):
        numbers(written(tmp_path, made, scheme))


def test_layouts_that_gptqmodel_names_otherwise(tmp_path: Path) -> None:
    parts, expected = KINDS["awq"].quantise(torch.randn(16, 64))
    scheme = {"quant_method": "awq", "bits": 4, "group_size": 32}
    assert torch.equal(numbers(written(tmp_path, parts, scheme | {"checkpoint_format": "gemm"})), expected)
    for key in ("format", "checkpoint_format", "version"):
        with pytest.raises(ModelError, match=r"version 'gemv_fast'.*serve AWQ of 4 bits, version 'gemm'"):
            numbers(written(tmp_path, parts, scheme | {key: "gemv_fast"}))


def test_whole_numbers_are_no_weights_for_transformers_either(tmp_path: Path) -> None:
    """They were cast to --dtype, as if they were numbers."""
    config = {
        **{"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "vocab_size": 16, "hidden_size": 32},
        **{"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"head_dim": 16, "quantization_config": LLM_INT8},
    }
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tensors[f"{Q}.weight"] = (100 * tensors[f"{Q}.weight"]).to(torch.int8)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(save(tensors))
    with pytest.raises(ModelError, match=rf"{Q}.weight' holds whole numbers"):
        load_model(EngineConfig(model=str(tmp_path)))
