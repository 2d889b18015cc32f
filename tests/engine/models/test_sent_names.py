"""Updates by a trainer whose tensors are called and cut as in its module, or as in the files it saves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.sent_names import find_place
from slipstream.engine.operations import (
    BeginTargetUpdate,
    ChecksumTarget,
    FillTarget,
    FinishTargetUpdate,
    ReadTarget,
    ReadTensor,
    ReleaseMemory,
    ResumeMemory,
)
from slipstream.engine.testing.local import POLICY, LocalEngine, policy, write_policy

FAMILIES = {
    entry["family"]: entry["config"] for entry in json.loads(Path(__file__).with_name("families.json").read_text())
}
NAMED = {
    "experts, native": "Qwen3-MoE",
    "experts": "Mixtral",
    "router": "Phi-3.5-MoE",
    "fused in files": "Granite MoE",
    "buffers": "DeepSeek-V3",
    "transposed": "gpt-oss",
    "output": "GPT-NeoX / Pythia",
    "sees": "Qwen2.5-VL",
    "sees, prefixed": "Gemma 3 (vision)",
}
PROMPT = list(range(7, 30))
UP, DOWN = (f"model.layers.1.mlp.experts.{each}_proj" for each in ("gate_up", "down"))
Make = Callable[[dict[str, Any]], Any]


def engine(folder: Path, **options: Any) -> LocalEngine:
    return LocalEngine(
        EngineConfig(**({"model": str(folder), "dtype": "float32", "kv_cache_memory": "2MiB"} | options))
    )


def change(tensors: Any) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn_like(tensor) * tensor.abs().mean())


def digests(tensors: dict[str, Tensor], dtype: str = "float32") -> dict[str, str]:
    return {
        name: hashlib.sha256(
            tensor.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("family", NAMED.values(), ids=NAMED)
def test_trainers_send_what_modules_and_files_have(family: str, tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model(FAMILIES[family])
    local = engine(model.folder)
    before = None
    for is_file in (False, True):
        change(model.module.parameters())
        sent = {name: each.detach().clone() for name, each in model.module.named_parameters()}
        if is_file:
            change(each for each in model.module.state_dict().values() if each.is_floating_point())
            model.module.save_pretrained(tmp_path / "saved")
            sent = load_file(tmp_path / "saved" / "model.safetensors")
        expected = model.generate(PROMPT, 6)
        assert expected != before, "nothing would be seen"
        before = expected
        local.operate(BeginTargetUpdate(1), FillTarget(1, save(sent)), FinishTargetUpdate(1, checksums=digests(sent)))
        found = local.generate([PROMPT], SamplingParams(max_tokens=6, temperature=0.0))[0]
        assert found.tokens == expected, is_file
    local.close()


def test_what_a_module_keeps_beside_parameters_comes_from_files(tiny_model: Make, tmp_path: Path) -> None:
    """DeepSeek-V3's correction of experts' scores is learned, and no parameter."""
    model = tiny_model(FAMILIES["DeepSeek-V3"])
    local = engine(model.folder)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.module.state_dict()[name].copy_(torch.arange(4.0))
    model.module.save_pretrained(tmp_path / "saved")
    local.operate(BeginTargetUpdate(1), ReadTarget(1, str(tmp_path / "saved")), FinishTargetUpdate(1))
    found = local.operate(ReadTensor(name, 0, 4))
    assert np.array_equal(np.frombuffer(found.values, np.float32), model.module.state_dict()[name].numpy())
    local.close()


def test_experts_may_come_in_part_and_are_read_together(tiny_model: Make) -> None:
    model = tiny_model(FAMILIES["Qwen3-MoE"])
    local = engine(model.folder)
    whole = dict(model.module.named_parameters())[UP].detach()
    some = torch.randn_like(whole[1:3])
    local.operate(BeginTargetUpdate(1), FillTarget(1, save({UP: some}), {UP: 1}), FinishTargetUpdate(1, keep_rest=True))
    expected = torch.cat((whole[:1], some, whole[3:]))
    found = local.operate(ReadTensor(UP, 0, 100))
    assert found.shape == tuple(expected.shape)
    assert np.array_equal(np.frombuffer(found.values, np.float32), expected.numpy().ravel())
    found = local.operate(ReadTensor(UP, 2, 1))
    assert np.array_equal(np.frombuffer(found.values, np.float32), expected[2].numpy().ravel())
    for wrong, first in ((whole[:, 1:], None), (whole[:2], None), (whole[:2], 3), (whole[:2], -1), (whole[0], None)):
        fill = FillTarget(1, save({UP: wrong.contiguous()}), {} if first is None else {UP: first})
        with pytest.raises(ModelError, match=r"gate_up_proj' has shape .* the configuration needs"):
            local.operate(BeginTargetUpdate(1), fill)
    local.close()


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "quantize": "q8"}], ids=["numbers", "packed"])
def test_a_tied_output_matrix_may_be_among_those_whose_checksums_are_told(tmp_path: Path, options: Any) -> None:
    config = POLICY | {"tie_word_embeddings": True}
    tensors = {name: each for name, each in policy(0).items() if name != "lm_head.weight"}
    local = engine(write_policy(tmp_path / "tied", tensors, config), **options)
    sent = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    told = digests(sent, local.engine.loaded.model.formats.numbers)
    local.operate(BeginTargetUpdate(1), FillTarget(1, save(sent)), FinishTargetUpdate(1, checksums=told))
    assert local.operate(ChecksumTarget()).by_name.keys() == tensors.keys()
    local.close()


def test_checksums_of_experts_that_are_packed_again_are_those_of_what_came(tiny_model: Make) -> None:
    model = tiny_model(FAMILIES["Qwen3-MoE"])
    local = engine(model.folder, dtype="bfloat16", quantize="q8")
    sent = {name: each.detach().clone() for name, each in model.module.named_parameters()}
    told = digests(sent, local.engine.loaded.model.formats.numbers)
    local.operate(BeginTargetUpdate(1), FillTarget(1, save(sent)), FinishTargetUpdate(1, checksums=told))
    with pytest.raises(ModelError, match=r"1 tensors are not those .*gate_up_proj"):
        local.operate(
            BeginTargetUpdate(2), FillTarget(2, save(sent)), FinishTargetUpdate(2, checksums=told | {UP: told[DOWN]})
        )
    local.close()


def test_a_model_of_text_alone_has_no_place_for_what_sees(tmp_path: Path) -> None:
    local = engine(write_policy(tmp_path / "text", policy(0)))
    with pytest.raises(ModelError, match=r"'model\.visual\.merger\.weight' that this architecture does not have"):
        local.operate(BeginTargetUpdate(1), FillTarget(1, save({"model.visual.merger.weight": torch.zeros(2)})))
    local.close()


def test_a_lora_of_a_model_that_sees_changes_its_decoder(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model(FAMILIES["Qwen2.5-VL"])
    local = engine(model.folder)
    inside = "model.language_model.layers.0.self_attn.q_proj"
    rows, columns = dict(model.module.named_parameters())[f"{inside}.weight"].shape
    down, up = torch.randn(4, columns), torch.randn(rows, 4)
    prefix = f"base_model.model.{inside}"
    lora = {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    save_file(lora, tmp_path / "lora" / "adapter_model.safetensors")
    local.operate(BeginTargetUpdate(1), ReadTarget(1, str(tmp_path / "lora"), is_lora=True), FinishTargetUpdate(1))
    dict(model.module.named_parameters())[f"{inside}.weight"].data += up @ down
    found = local.generate([PROMPT], SamplingParams(max_tokens=6, temperature=0.0))[0]
    assert found.tokens == model.generate(PROMPT, 6)
    local.close()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("model.text_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.vision_model.encoder.layers.3.mlp.up_proj.weight", ""),
    ],
)
def test_names_inside_other_models(name: str, known: str) -> None:
    weights = {"model.layers.3.mlp.up_proj.weight": (4, 4), "model.norm.weight": (4,), "lm_head.weight": (8, 4)}
    assert find_place(name, weights).names == (known or name,)


def test_files_may_have_what_modules_have(tiny_model: Make, tmp_path: Path) -> None:
    """As a training that saves the state of its module itself writes them."""
    model = tiny_model(FAMILIES["Qwen3-MoE"])
    (tmp_path / "model.safetensors").unlink()
    save_file({name: each.detach() for name, each in model.module.named_parameters()}, tmp_path / "model.safetensors")
    local = engine(tmp_path)
    asked, expected = SamplingParams(max_tokens=6, temperature=0.0), model.generate(PROMPT, 6)
    assert local.generate([PROMPT], asked)[0].tokens == expected
    local.operate(ReleaseMemory(("weights", "kv_cache"), keep_weights=False, abort=True))
    local.operate(ResumeMemory(("weights", "kv_cache")))
    assert local.generate([PROMPT], asked)[0].tokens == expected
    local.close()
