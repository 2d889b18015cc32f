"""LoRAs beside the model's weights: what requests with one are answered, in any batch, and whose it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from slipstream.drafter.lookup import NGramDrafter
from slipstream.engine.adapters import Adapters
from slipstream.engine.background import Background
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.operations import (
    BeginTargetUpdate,
    FillTarget,
    FinishTargetUpdate,
    LoadAdapter,
    UnloadAdapter,
)
from slipstream.engine.scheduling import calibration
from slipstream.engine.speculation.oracles import TreeOracleDrafter
from slipstream.engine.testing.local import POLICY, Completion, LocalEngine, policy, write_policy
from slipstream.engine.testing.lora import random_lora, write_lora
from slipstream.kernels.adapter import ADAPTED, ADAPTED_MLP
from slipstream.kernels.triton import launch

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6] * 3
MODULES = {"all": (*ADAPTED, *ADAPTED_MLP), "some": ("self_attn.v_proj", "mlp.up_proj")}
VOCABULARY = len(policy(0)["model.embed_tokens.weight"])
Tensors = dict[str, Tensor]


def lora(seed: int, rank: int, modules: str = "all", layers: tuple[int, ...] = (0, 1)) -> Tensors:
    parts = tuple(f"layers.{layer}." for layer in layers)
    shapes = {name: tensor.shape for name, tensor in policy(0).items() if any(part in name for part in parts)}
    return random_lora(shapes, rank, seed, modules=MODULES[modules])


LORAS = {"a": lora(1, 4), "b": lora(2, 24), "c": lora(3, 3, "some", (1,))}
"""They have several ranks, and one changes some matrices of a layer only."""


def write(folder: Path, tensors: Tensors, **config: Any) -> Path:
    return write_lora(folder, tensors, **({"scale": 0.5} | config))


def merged(tensors: Tensors) -> bytes:
    """The whole model with a LoRA in its weights."""
    found = {name: tensor.float() for name, tensor in policy(0).items()}
    for name, up in tensors.items():
        if "lora_B" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            found[f"{module}.weight"] += 0.5 * (up @ tensors[name.replace("lora_B", "lora_A")])
    return save(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policies") / "0", policy(0))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that transformers computes, since its activation is another."""
    return write_policy(tmp_path_factory.mktemp("policies") / "gelu", policy(0), POLICY | {"hidden_act": "gelu"})


@pytest.fixture
def start(folder: Path, foreign: Path, tmp_path: Path) -> Iterator[Callable[..., LocalEngine]]:
    """An engine with LORAS."""
    started = []

    def start(drafters: Any = (), **fields: Any) -> LocalEngine:
        is_foreign = fields.pop("is_foreign", False)
        # Two, between which the compiled kernels divide a LoRA's work; torch's would only spin.
        threads = 1 if is_foreign or fields.get("kernels") in ("torch", "triton") else 2
        options = {"kv_cache_memory": "4MiB", "max_running": 8, "dtype": "float32", "pipeline": "off"}
        options["threads"] = threads
        model = foreign if is_foreign else folder
        started.append(LocalEngine(EngineConfig(model=str(model), **(options | fields)), drafters))
        for name, tensors in LORAS.items():
            started[-1].operate(LoadAdapter(name, str(write(tmp_path / name, tensors))))
        return started[-1]

    yield start
    for local in started:
        local.close()


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 16, "temperature": 0.0, "logprobs": 2} | fields))


def told(completion: Completion) -> tuple[list[int], list[float]]:
    assert not completion.deltas[-1].error, completion.deltas[-1].error
    return completion.tokens, [each.logprob for delta in completion.deltas for each in delta.logprobs or []]


def answers(
    local: LocalEngine, names: list[str], prompt: list[int] = PROMPT, **fields: Any
) -> list[tuple[list[int], list[float]]]:
    """All of them together."""
    open_requests = [local.submit(prompt, params(**fields), adapter=name) for name in names]
    local.finish()
    return [told(each) for each in open_requests]


KINDS: dict[str, dict[str, Any]] = {
    "native": {"kernels": "native"},
    "native bfloat16": {"kernels": "native", "dtype": "bfloat16"},
    "torch": {"kernels": "torch"},
    "transformers": {"is_foreign": True},
}
TOLERANCE = {"native": 1e-4, "torch": 1e-4, "transformers": 1e-4, "native bfloat16": 0.1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LORAS)
def test_answers_are_those_of_the_merged_weights(start: Callable[..., LocalEngine], kind: str, name: str) -> None:
    local = start(**KINDS[kind])
    [beside, plain] = (answers(local, [each])[0] for each in (name, ""))
    local.operate(BeginTargetUpdate(1), FillTarget(1, merged(LORAS[name])), FinishTargetUpdate(1))
    [inside] = answers(local, [""])
    assert np.allclose(beside[1][0], inside[1][0], atol=TOLERANCE[kind])
    assert not np.allclose(plain[1][0], inside[1][0], atol=TOLERANCE[kind])
    if kind != "native bfloat16":
        assert beside[0] == inside[0]
        assert np.allclose(beside[1], inside[1], atol=TOLERANCE[kind])


@pytest.mark.parametrize("kind", ["torch", "transformers"])
def test_each_request_of_a_batch_has_its_own(start: Callable[..., LocalEngine], kind: str) -> None:
    names = ["a", "", "b", "b", "", "c", "a"]
    quiet = start(**KINDS[kind], prefix_caching=False)
    assert quiet.engine.loaded.model.kernels == f"{kind}-cpu"
    alone = [answers(quiet, [name])[0] for name in names]
    drafters = [TreeOracleDrafter({tuple(PROMPT): alone[0][0]}, 0.7, VOCABULARY)] if kind == "torch" else []
    together = answers(start(drafters, **KINDS[kind], max_step_tokens=24, speculation_policy="fixed"), names)
    for one, other in zip(alone, together, strict=True):
        assert one[0] == other[0] and np.allclose(one[1], other[1], atol=1e-4)
    assert len({str(tokens) for tokens, _ in alone}) == 4


@pytest.mark.skipif(not launch.runs_on("cpu"), reason="Triton is not interpreted here")
def test_triton_says_what_torch_says(start: Callable[..., LocalEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens, since each step takes its interpreter seconds."""
    import bf16_interpreter  # noqa: F401  (mends the interpreter)

    monkeypatch.setattr(calibration, "PROFILE_TOKENS", (1,))
    monkeypatch.setattr(calibration, "PROBE_CONTEXT", 16)
    names = ["a", "", "b"]
    expected, found = (
        answers(start(kernels=kernels), names, PROMPT[:5], max_tokens=2) for kernels in ("torch", "triton")
    )
    for one, other in zip(expected, found, strict=True):
        assert one[0] == other[0] and np.allclose(one[1], other[1], atol=1e-3)


@pytest.mark.parametrize("drafter", ["none", "lookup", "tree"])
@pytest.mark.parametrize("kind", ["native", "native bfloat16"])
def test_a_request_has_the_same_bits_in_any_batch(start: Callable[..., LocalEngine], kind: str, drafter: str) -> None:
    """With others of other adapters, prompts in chunks, and draft tokens."""
    names = ["a", "", "b", "b", "", "c", "a"]
    quiet = start(**KINDS[kind], prefix_caching=False)
    alone = [answers(quiet, [name])[0] for name in names]
    drafters = {
        "none": [],
        "lookup": [NGramDrafter()],
        "tree": [TreeOracleDrafter({tuple(PROMPT): alone[0][0]}, 0.7, VOCABULARY)],
    }
    options = KINDS[kind] | {"max_step_tokens": 24, "speculation_policy": "fixed"}
    assert answers(start(drafters[drafter], **options), names) == alone


def test_prefixes_are_found_by_adapter(start: Callable[..., LocalEngine]) -> None:
    local = start()
    first = answers(local, ["a", "", "b"])
    hits = local.stats.prefix_cache_hits
    assert hits == 0
    assert answers(local, ["a", "", "b"]) == first
    assert local.stats.prefix_cache_hits > 0


def test_a_request_ends_with_the_adapter_it_began_with(start: Callable[..., LocalEngine], tmp_path: Path) -> None:
    local = start()
    expected = answers(local, ["a", "b"], max_tokens=40)
    open_requests = [local.submit(PROMPT, params(max_tokens=40), adapter=name) for name in ("a", "b")]
    for _ in range(8):
        local.step()
    local.operate(LoadAdapter("a", str(write(tmp_path / "other", lora(9, 8)))), UnloadAdapter("b"))
    late = [local.submit(PROMPT, params(max_tokens=40), adapter=name) for name in ("a", "b")]
    local.finish()
    assert [told(each) for each in open_requests] == expected
    assert told(late[0]) != expected[0]
    assert "'b'" in (late[1].deltas[-1].error or "")


def test_what_nobody_uses_takes_no_memory(start: Callable[..., LocalEngine], tmp_path: Path) -> None:
    """As many are kept as have names, however often they are loaded anew, as trainers do."""
    local = start()
    before = answers(local, ["c"])
    for seed in range(5):
        local.operate(LoadAdapter("a", str(write(tmp_path / str(seed), lora(seed, 4)))))
        answers(local, ["a"])
    numbers = {each.number for name in LORAS if (each := local.engine.adapters.find(name)) is not None}
    assert numbers == {1, 2, 3}
    assert answers(local, ["c"]) == before


def test_memory_of_one_that_is_unloaded_is_the_systems(start: Callable[..., LocalEngine], tmp_path: Path) -> None:
    """Else there is no room for others, though there are none any more."""
    local, path = start(kernels="native"), write(tmp_path / "large", lora(1, 256))
    names = [str(number) for number in range(20)]
    size = len(names) * (path / "adapter_model.safetensors").stat().st_size
    local.operate(*(LoadAdapter(name, str(path)) for name in names))
    before = psutil.Process().memory_info().rss
    local.operate(*(UnloadAdapter(name) for name in names))
    assert before - psutil.Process().memory_info().rss > 0.8 * size > 20 << 20


class Slow(Background):
    """A slice is over with the first piece in it."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: 0.0)

    def _wait(self, seconds: float) -> None:
        assert self._turn.wait_for(lambda: not self._has_turn, 300.0)


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_steps_go_on_while_one_is_loaded(start: Callable[..., LocalEngine], tmp_path: Path, kernels: str) -> None:
    model, slow, steps = start(kernels=kernels).engine.loaded.model, Slow(), 0
    slow.poll(is_busy=True)  # or all of it may be over before the first step
    loading = Adapters(model, torch.device("cpu"), slow).operate(LoadAdapter("a", str(tmp_path / "a")))
    while not loading.done():
        slow.poll(is_busy=True)
        steps += 1
    loading.result()
    slow.close()
    assert steps > len(LORAS["a"]) + model.shape.num_layers


def test_one_for_which_there_is_no_memory_is_refused(
    start: Callable[..., LocalEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else ever new names would end the engine, and the one after it, which has them all again."""
    local = start()
    before = answers(local, ["a"])
    monkeypatch.setattr("slipstream.engine.adapters.available_memory", lambda _: 200 << 20)
    for name in ("a", "more"):
        with pytest.raises(ModelError, match=r"200\.0 MiB of memory are free, .* unload some of the 3"):
            local.operate(LoadAdapter(name, str(write(tmp_path / "more", lora(4, 4)))))
    assert answers(local, ["a"]) == before and local.engine.adapters.find("more") is None


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {}, "holds no matrices"),
        ({"model.norm.weight": torch.ones(64)}, {}, "is no matrix of a LoRA.*modules_to_save"),
        (lora(1, 2) | {"model.nose.lora_A.weight": torch.ones(2, 2)}, {}, "only the matrix A"),
        ({name: tensor[:1] for name, tensor in lora(1, 2).items()}, {}, "has the shapes"),
        (lora(1, 2), {"r": 8}, r"has the rank 2, and its configuration says 8 \(r\)"),
        (lora(1, 2), {"use_dora": True}, "use_dora"),
        (lora(1, 2), {"alora_invocation_tokens": [7, 8]}, "alora_invocation_tokens"),
        (lora(1, 2), {"init_lora_weights": "pissa_niter_4"}, "began with pissa_niter_4.*path_initial_model"),
        (lora(1, 2), {"init_lora_weights": "OLoRA"}, "began with OLoRA"),
        (lora(1, 2), {"peft_type": "ADALORA"}, r"of the type ADALORA \(peft_type\)"),
        (
            {"lm_head.lora_A.weight": torch.ones(2, 64), "lm_head.lora_B.weight": torch.ones(7, 2)},
            {},
            "lm_head",
        ),
    ],
)
def test_what_fits_no_model_is_refused(
    start: Callable[..., LocalEngine], tmp_path: Path, tensors: Tensors, config: dict[str, Any], message: str
) -> None:
    local = start()
    with pytest.raises(ModelError, match=message):
        local.operate(LoadAdapter("wrong", str(write(tmp_path / "wrong", tensors, **config))))
    assert local.engine.adapters.find("wrong") is None
    with pytest.raises(ModelError, match="no adapter_config"):
        local.operate(LoadAdapter("wrong", str(tmp_path)))
    (tmp_path / "wrong" / "adapter_model.safetensors").rename(tmp_path / "wrong" / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin, which is not read" if not config else "."):
        local.operate(LoadAdapter("wrong", str(tmp_path / "wrong")))
    with pytest.raises(ModelError, match="no LoRA 'wrong', but 'a', 'b', 'c'"):
        local.operate(UnloadAdapter("wrong"))


def test_without_memory_on_the_device_it_is_refused(
    start: Callable[..., LocalEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = start()

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(local.engine.loaded.model, "adapter", full)
    with pytest.raises(ModelError, match="no memory left for it on the device"):
        local.operate(LoadAdapter("large", str(write(tmp_path / "large", lora(1, 4)))))
    assert answers(local, ["a"])


def test_what_transformers_computes_elsewhere_is_refused(start: Callable[..., LocalEngine], tmp_path: Path) -> None:
    local = start(is_foreign=True)
    for name in ("lm_head", "model.embed_tokens"):
        tensors = {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(VOCABULARY, 2)}
        with pytest.raises(ModelError, match=f"{name}.*only linear layers that all tokens go through"):
            local.operate(LoadAdapter("wrong", str(write(tmp_path / name, tensors))))
