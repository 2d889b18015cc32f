"""GGUF files of every architecture compute what transformers does with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.checkpoint.gguf_architectures import ARCHITECTURES
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.models.loader import load_model
from slipstream.engine.testing.gguf import write_gguf
from slipstream.kernels.batch import make_batch

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 32,
}
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "llama", {"tie_word_embeddings": False}),
    ("llama", "mistral", {"sliding_window": 16}),
    ("llama", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    ("qwen2", "qwen2", {"tie_word_embeddings": True}),
    ("qwen2vl", "qwen2", {}),
    ("qwen3", "qwen3", {"head_dim": 32}),
    ("qwen3vl", "qwen3", {"head_dim": 32}),
    ("qwen3moe", "qwen3_moe", {**EXPERTS, "norm_topk_prob": True, "head_dim": 32}),
    ("qwen3vlmoe", "qwen3_moe", {**EXPERTS, "norm_topk_prob": True, "head_dim": 32}),
    ("qwen2moe", "qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    ("gemma", "gemma", {"head_dim": 16}),
    ("gemma2", "gemma2", GEMMA | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}),
    ("gemma3", "gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    ("gemma3", "gemma3_text", GEMMA | {"num_hidden_layers": 7, "rope_parameters": "scaled"}),
    ("gemma3", "gemma3_text", GEMMA | {"final_logit_softcapping": 10.0}),
    ("phi3", "phi3", {"sliding_window": 24}),
    ("phi3", "phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    ("smollm3", "smollm3", {"num_hidden_layers": 5, "use_sliding_window": False, "sliding_window": None}),
    (
        "granite",
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "logits_scaling": 8.0,
        },
    ),
]
NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def made(model_type: str, changes: dict[str, Any]) -> Any:
    """With every parameter random, norms and biases included."""
    if changes.get("rope_parameters") == "scaled":
        changes = changes | {"rope_parameters": NESTED}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **(SIZES | changes)), attn_implementation="eager", dtype=torch.float32
    ).eval()
    for name, parameter in model.named_parameters():
        around = 1.0 if "norm" in name and "gemma" not in model_type else 0.0
        torch.nn.init.normal_(parameter, around, 0.3 if "norm" in name or "bias" in name else 0.12)
    return model


def written(path: Path, model: Any, arch: str, **options: Any) -> Path:
    tensors = revert_weight_conversion(model, dict(model.state_dict()))
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return write_gguf(path, tensors, model.config.to_dict(), arch=arch, **options)


@torch.inference_mode()
def logits_here(path: Path, ids: list[int], **options: Any) -> torch.Tensor:
    known = {"dtype": "float32", "weights": "float32", "kv_cache_memory": "4MiB", "threads": 1, "max_running": 2}
    model = load_model(EngineConfig(model=str(path), **(known | options))).model  # type: ignore[arg-type]
    counts, blocks = np.array([len(ids)], np.int32), np.arange(5, dtype=np.int32)[None]
    batch = make_batch(np.array(ids, np.int32), counts, counts, blocks, np.zeros(1, np.int32), 16)
    hidden = model.forward(batch, model.new_cache(5, 16)).hidden
    return model.logits(hidden, np.arange(len(ids), dtype=np.int32)).clone()


@pytest.mark.parametrize(
    ("arch", "model_type", "changes"), MODELS, ids=[f"{arch}-{at}" for at, (arch, *_) in enumerate(MODELS)]
)
def test_a_file_computes_what_transformers_does(
    tmp_path: Path, arch: str, model_type: str, changes: dict[str, Any]
) -> None:
    model = made(model_type, changes)
    path = written(tmp_path / "model.gguf", model, arch, types={})
    assert open_checkpoint(path).config["model_type"] == model_type
    ids = torch.randint(1, 48, (40 if "longrope" not in str(changes) else 30,)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    found = logits_here(path, ids)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_every_architecture_is_held_against_transformers() -> None:
    assert {arch for arch, *_ in MODELS} == set(ARCHITECTURES)


def small(tmp_path: Path, **options: Any) -> Path:
    return written(tmp_path / "model.gguf", made("qwen3", {"head_dim": 16}), "qwen3", types={}, **options)


def test_a_model_in_parts_is_given_by_its_first_part_or_its_folder(tmp_path: Path) -> None:
    whole, folder = small(tmp_path), tmp_path / "parts"
    folder.mkdir()
    first = small(folder, split=8)
    parts = sorted(folder.iterdir())
    assert first == parts[0] and len(parts) > 2
    (folder / "mmproj-model.gguf").touch()  # what sees is not served
    expected = dict(open_checkpoint(whole).tensors())
    for path in (first, folder):
        found = open_checkpoint(path)
        assert found.path == first and found.config == open_checkpoint(whole).config
        tensors = dict(found.tensors())
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_parts_that_are_no_model_are_told(tmp_path: Path) -> None:
    first = small(tmp_path, split=8)
    second, third, *_ = parts = sorted(tmp_path.iterdir())[1:]

    def refused(path: Path, *words: str) -> None:
        with pytest.raises(ModelError) as caught:
            open_checkpoint(path)
        assert all(word in str(caught.value) for word in words), str(caught.value)

    refused(second, "is not the first of its", f"give {first}")
    content = second.read_bytes()
    for other in (third, first):
        second.write_bytes(other.read_bytes())
        refused(first, second.name, "is not part 2", "again")
    second.unlink()
    refused(first, f"is one of {len(parts) + 1} parts", second.name, "same folder")
    second.write_bytes(content)
    renamed = first.rename(first.with_name("renamed.gguf"))
    refused(renamed, "llama-gguf-split", "names that they were published with")


def test_experts_in_tensors_of_their_own_are_told(tmp_path: Path) -> None:
    """As files from before 2024 have them."""
    model = made("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None})
    config = model.config.to_dict() | {"num_local_experts": 3}
    tensors = revert_weight_conversion(model, dict(model.state_dict()))
    with pytest.raises(ModelError, match="states 3 experts"):
        open_checkpoint(write_gguf(tmp_path / "model.gguf", tensors, config, {}))


def test_layers_that_see_all_are_those_that_the_file_names(tmp_path: Path) -> None:
    model = made("gemma3_text", GEMMA | {"num_hidden_layers": 7})

    def kinds(pattern: Any) -> list[str]:
        path = written(
            tmp_path / "model.gguf", model, "gemma3", types={}, more={"attention.sliding_window_pattern": pattern}
        )
        return [kind[0] for kind in open_checkpoint(path).config["layer_types"]]

    assert kinds(3) == ["s", "s", "f", "s", "s", "f", "s"]
    assert kinds([True, False, False, True, True, True, True]) == ["s", "f", "f", "s", "s", "s", "s"]


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q2_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "MXFP4"])
def test_numbers_of_any_type_are_read(tmp_path: Path, kind: str) -> None:
    model = made("qwen3", {"head_dim": 32, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1})
    place = dict.fromkeys(("attn_q", "ffn_up"), kind)
    can_write = kind in ("BF16", "F16", "MXFP4", "TQ1_0")
    path = written(
        tmp_path / "model.gguf", model, "qwen3", types=place if can_write else {}, raw={} if can_write else place
    )
    found, name = open_checkpoint(path), "model.layers.0.mlp.up_proj.weight"
    assert found.formats()[name] == kind
    tensor = dict(found.tensors())[name]
    assert tensor.shape == (256, 256) and (
        not can_write or float((tensor - model.state_dict()[name]).abs().max()) < 0.5
    )
    assert logits_here(path, [1, 2, 3], dtype="bfloat16", weights="auto").isfinite().all()
