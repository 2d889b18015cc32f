"""Runs the whole engine with ``device=cuda`` where there is no GPU: the CPU's tokens, and no access that a GPU forbids.

    pip install --no-deps --target peers triton==3.8.0
    pip install --no-deps --target peers --ignore-requires-python ttsem==0.1.0
    PYTHONPATH=peers python -P scripts/emulate_gpu.py [--only NAME …] [--markdown FILE]

ttsem compiles every launch for sm_90 and executes what the compiler made of it on the CPU. An access outside of the
tensors that a kernel was given, or two programs of a launch at the same number, one of which writes something else, is
an error with the line of the kernel; memory that nobody wrote is no number. Streams and events are nothing here, and a
graph runs its work again, into the memory of the first results, after the runs that CUDA has before recording.

What this cannot show: the order of streams, what a GPU's own instructions round to, and any speed. First, planted
faults have to be found. The exit status is 1 if one is not, or if a token differs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported

import torch
from safetensors.torch import save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from slipstream.drafter.choice import make_drafters
from slipstream.engine.background import Background, done
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.operations import (
    BeginTargetUpdate,
    FillTarget,
    FinishTargetUpdate,
    MemoryTag,
    ReleaseMemory,
    ResumeMemory,
)
from slipstream.engine.testing.gguf import PACKED_TYPES, write_gguf
from slipstream.engine.testing.local import POLICY, LocalEngine, policy, write_policy
from slipstream.engine.testing.quantised import KINDS, write_quantised

CAPABILITY = 90
TABLE = ("| run | |", "|---|---|")
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 64}
LLAMA |= {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA |= {"num_hidden_layers": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 32, "head_dim": 16}
SHORT = LLAMA | {"max_position_embeddings": 13}  # as many as the longest request takes
MIXTURE = LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4}
MIXTURE |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True, "decoder_sparse_step": 1}
MIXTURE |= {"mlp_only_layers": []}
BLOCKS = POLICY | {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
BLOCKS |= {"max_position_embeddings": 32}  # rows of one block of 32 numbers
HEAD = {"speculation": "head", "drafter": "cold", "speculation_policy": "fixed", "max_draft_tokens": 3}
PACKED = {"weights": "packed", "load_format": "auto"}
FROM_NUMBERS = {"load_format": "auto", "quantize": "q4"}
PACKED_ALIKE = {"ffn_gate": "Q4_1", "ffn_up": "Q4_1"}
"""Instead of Q4_0, which a GPU keeps in the form of Q4_1: with a number more than a CPU has when it packs again."""
COMPILED = {"kernels": "native", "packed_arithmetic": "exact"}
SLEEP_TAGS: tuple[MemoryTag, ...] = ("kv_cache", "weights")


@dataclass(frozen=True)
class Run:
    """An engine on the GPU, and how its weights come."""

    model: dict[str, Any]
    options: dict[str, Any]
    files: str = "none"
    """What the weights are in: none, numbers, gguf, or a kind of quantised checkpoint."""
    on_cpu: dict[str, Any] = field(default_factory=dict)
    """What the engine on the CPU has that gives the expected tokens, besides the options that both have."""
    is_changed: bool = False
    """Whether requests come again after some weights were updated, and again after it has slept."""

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        if self.files == "none":
            (folder / "config.json").write_text(json.dumps(self.model))
            return folder
        if self.files == "numbers":
            return write_policy(folder, policy(0, self.model), self.model)
        if self.files == "gguf":
            types = PACKED_TYPES | (PACKED_ALIKE if self.is_changed else {})
            return write_gguf(folder / "policy.gguf", policy(0, self.model), self.model, types)
        return write_quantised(folder, policy(0, self.model), self.model, KINDS[self.files])[0]

    @property
    def expected(self) -> dict[str, Any]:
        of_gpus = ("deterministic", "graph_memory", *(() if self.on_cpu else ("weights",)))
        return {name: value for name, value in self.options.items() if name not in of_gpus} | self.on_cpu


CASES = {
    "a head, chains": Run(LLAMA, HEAD),
    "a head, chains, launched ahead": Run(LLAMA, HEAD | {"pipeline": "on"}),
    "a head, chains, launched ahead, to the last position": Run(SHORT, HEAD | {"pipeline": "on"}),
    "a head, trees, to the last position": Run(SHORT, HEAD | {"draft_width": 2}),
    "no drafter, in chunks": Run(LLAMA, {"max_step_tokens": 4}),
    "n-grams": Run(LLAMA, HEAD | {"speculation": "ngram"}),
    "a head, trees": Run(LLAMA, HEAD | {"draft_width": 2}),
    "a mixture of experts": Run(MIXTURE, {}),
    "without graphs": Run(LLAMA, HEAD | {"graph_memory": "0"}),
    "deterministic": Run(LLAMA, {"deterministic": True}),
    "one stream after the other, bfloat16": Run(LLAMA, {"dtype": "bfloat16", "max_running": 1}),
    "a cache in int8, a head's trees": Run(LLAMA, HEAD | {"draft_width": 2, "kv_cache_dtype": "int8"}),
    "a cache in int8, in chunks, launched ahead": Run(
        LLAMA, HEAD | {"max_step_tokens": 4, "pipeline": "on", "kv_cache_dtype": "int8"}
    ),
    "a cache in fp8, a head, chains": Run(LLAMA, HEAD | {"kv_cache_dtype": "fp8"}),
    "a cache in fp8, without graphs": Run(LLAMA, {"kv_cache_dtype": "fp8", "graph_memory": "0"}),
    "a GGUF file's packed weights": Run(BLOCKS, PACKED, "gguf"),
    "GPTQ, 8 bits with a zero": Run(BLOCKS, PACKED, "gptq-8-asymmetric"),
    "AWQ, 4 bits with a zero": Run(BLOCKS, PACKED, "awq"),
    "--quantize q8, a head, chains": Run(BLOCKS, HEAD | FROM_NUMBERS | {"quantize": "q8"}, "numbers", COMPILED),
    "--quantize q4, a cache in int8": Run(BLOCKS, FROM_NUMBERS | {"kv_cache_dtype": "int8"}, "numbers", COMPILED),
    "--quantize q4, updated and asleep": Run(BLOCKS, FROM_NUMBERS, "numbers", COMPILED, is_changed=True),
    "packed weights, updated and asleep": Run(BLOCKS, PACKED, "gguf", COMPILED, is_changed=True),
}
PROMPTS = ([5, 9, 5, 9, 5, 9, 5], [30, 31, 3], [7, 7, 8, 7, 7])
PARAMS = (
    SamplingParams(max_tokens=6, temperature=0.0),
    SamplingParams(max_tokens=5, seed=3, top_k=8, logprobs=2),
    SamplingParams(max_tokens=4, seed=4, top_p=0.9, presence_penalty=0.5, logit_bias={5: 0.5}),
)


class Stream:
    """A stream or an event: everything is over at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record(self) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class Inline:
    """A thread that is this one: the modes that send everything to the CPU are those of one thread."""

    def __init__(self, *_: Any) -> None: ...

    def submit(self, call: Callable[..., Any], *given: Any) -> None:
        call(*given)

    def shutdown(self) -> None: ...


def at_once(background: Background, prepare: Callable[[], Callable[[], Any]], key: Any = None) -> Any:
    """What would be prepared in another thread, in this one."""
    land = prepare()
    background._settle()
    return done(land())


class Graph:
    """Work that is done again, with its results where they were."""

    def __init__(self, pool: Any, stream: Any) -> None: ...

    def record(self, work: Callable[[], Any]) -> Any:
        self._work, self._result = work, work()
        return self._result

    def replay(self) -> None:
        for old, new in zip(tensors(self._result), tensors(self._work()), strict=True):
            old.copy_(new)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts: Any = value if isinstance(value, (list, tuple)) else ()
    if is_dataclass(value):
        parts = [getattr(value, field.name) for field in fields(value)]
    return [tensor for part in parts for tensor in tensors(part)]


class NotPinned(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.pin_memory:
            return args[0]
        return function(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})


@contextlib.contextmanager
def emulated() -> Iterator[Any]:
    """Inside, the GPU is ttsem; gives its session, which counts launches."""
    sanitize = importlib.import_module("ttsem.sanitize")
    with sanitize.session(CAPABILITY, "the engine") as session, NotPinned():
        generator = torch.Generator
        torch.Generator = lambda device=None: generator()  # type: ignore[misc, assignment]
        answers: dict[str, Any] = {"Stream": Stream, "Event": Stream, "current_stream": Stream}
        answers |= {"mem_get_info": lambda device=None: (80 << 30, 80 << 30)}
        answers |= {"stream": lambda stream: contextlib.nullcontext(), "graph_pool_handle": lambda: None}
        nothing = ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated", "memory_reserved")
        answers |= dict.fromkeys((*nothing, "empty_cache", "synchronize"), lambda device=None: 0)
        for name, answer in answers.items():
            setattr(torch.cuda, name, answer)
        vars(importlib.import_module("slipstream.kernels.triton.graphs"))["CudaGraph"] = Graph
        vars(importlib.import_module("slipstream.engine.core"))["ThreadPoolExecutor"] = Inline
        Background.start = at_once  # type: ignore[method-assign, assignment]
        # How long steps take is of no interest here.
        calibration = importlib.import_module("slipstream.engine.scheduling.calibration")
        vars(calibration).update(PROFILE_TOKENS=(1,), PROBE_TOKENS=1, PROBE_CONTEXT=16)
        yield session


def planted() -> list[tuple[str, str]]:
    """What is said of faults: a block beyond the cache, a token that is none, and two tokens at one place."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/kernels/triton"))
    ragged = importlib.import_module("ragged")
    cache = importlib.import_module("slipstream.kernels.triton.cache")
    attention = importlib.import_module("slipstream.kernels.triton.attention")
    heads = torch.zeros(2, 1, 16, device="cuda")
    apart = heads + torch.arange(2, device="cuda")[:, None, None]
    keys = torch.zeros(2, 7 * 16, 1, 16, device="cuda")
    tables, _ = ragged.scattered_tables([20, 20], 16)

    def beyond() -> None:
        wrong = ragged.device_batch(tables.clone().fill_(10_000), 16, [1, 1], [20, 20])
        cache.place(wrong)
        attention.attention(heads, keys[0], keys[1], wrong, 1.0, max_context=20)

    def longer() -> None:
        cache.place(ragged.device_batch(tables, 16, [1, 1], [20, 60]))

    def twice() -> None:
        batch = ragged.device_batch(tables, 16, [1, 1], [20, 20], rows=[0, 0])
        cache.place(batch)
        cache.store(batch, heads, apart, keys[0], keys[1])

    told = []
    faults = {"a block beyond the cache": beyond, "a sequence longer than its table": longer}
    for name, fault in (faults | {"two tokens at one place": twice}).items():
        try:
            fault()
        except importlib.import_module("ttsem.sanitize").KernelFault as error:
            found = error.fault
            where = f", line {found.source_line}: `{found.source_text}`" if found.source_line else ""
            told.append((name, f"{found.kind} in `{found.kernel}`{where}"))
        else:
            told.append((name, ""))
    return told


def answers(model: Path, device: str, options: dict[str, Any], is_changed: bool) -> tuple[list[list[int]], str]:
    """Tokens of all requests, and the name of the kernels that computed them."""
    fields: dict[str, Any] = {
        "load_format": "dummy",
        "device": device,
        "dtype": "float32",
        "kv_cache_memory": "256KiB",
        "threads": 1,
        "pipeline": "off",
    }
    config = EngineConfig(model=str(model), **(fields | options))
    made = LocalEngine(config, make_drafters(config) if options.get("speculation") else ())
    try:
        found = said(made)
        if is_changed:
            others = policy(1, BLOCKS).items()
            sent = {name: tensor for name, tensor in others if "layers.0" in name or "lm_head" in name}
            made.operate(BeginTargetUpdate(1, "recompute"), FillTarget(1, save(sent)))
            made.operate(FinishTargetUpdate(1, keep_rest=True))
            found += said(made)
            made.operate(ReleaseMemory(SLEEP_TAGS), ResumeMemory(SLEEP_TAGS))
            found += said(made)
        return found, made.engine.runner.model.kernels
    finally:
        made.close()


def page(lines: list[str], before: str) -> str:
    """The log of these lines, and of what an earlier log has of other runs by the same versions."""
    head = f"Written by `python -P scripts/emulate_gpu.py` with ttsem {version('ttsem')}, Triton {version('triton')} "
    head += f"and torch {torch.__version__}, on a CPU, for compute capability {CAPABILITY / 10}."
    earlier = (
        [line for line in before.splitlines() if line.startswith("| ") and line not in TABLE] if head in before else []
    )
    rows = {line.split(" | ")[0]: line for line in (*earlier, *lines)}
    order = {f"| {name}": at for at, name in enumerate(CASES)}  # planted faults first
    told = sorted(rows.items(), key=lambda row: order.get(row[0], -1))
    return "\n".join(["# The engine on an emulated GPU", "", head, "", *TABLE, *(line for _, line in told), ""])


def said(local: LocalEngine) -> list[list[int]]:
    asked = [local.submit(list(ids), params) for ids, params in zip(PROMPTS, PARAMS, strict=True)]
    local.finish()
    return [each.tokens for each in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(CASES), help="default all")
    parser.add_argument("--markdown", type=Path, help="write the log to this file, or to what it has of other runs")
    asked = parser.parse_args()
    cases = {name: CASES[name] for name in asked.only or CASES}
    with tempfile.TemporaryDirectory() as folder:
        models = {name: run.write(Path(folder) / str(at)) for at, (name, run) in enumerate(cases.items())}
        expected = {}
        for name, run in cases.items():  # before the session: inside it every tensor says it is CUDA's
            expected[name] = answers(models[name], "cpu", {"kernels": "torch"} | run.expected, run.is_changed)[0]
        lines, fine = [], True
        with emulated() as session:
            for name, told in planted():
                fine &= bool(told)
                lines.append(f"| planted: {name} | {told or '**not found**'} |")
                print(lines[-1], flush=True)
            for name, run in cases.items():
                began, launches = time.monotonic(), session.launches
                found, kernels = answers(models[name], "cuda", {"kernels": "triton"} | run.options, run.is_changed)
                same = found == expected[name]
                fine &= same and kernels == "triton-cuda"
                count = sum(map(len, found))
                told = f"{count} of {count} tokens are the CPU's" if same else f"**{found}, and not {expected[name]}**"
                told += f"; {session.launches - launches} launches, none out of bounds, no race"
                lines.append(f"| {name} | {told} |")
                print(lines[-1], f"{time.monotonic() - began:.0f} s", flush=True)
        if session.races_unchecked:
            lines.append(f"| | {session.races_unchecked} launches were too large to look for races in |")
    if asked.markdown:
        asked.markdown.write_text(page(lines, asked.markdown.read_text() if asked.markdown.exists() else ""))
    sys.exit(not fine)


if __name__ == "__main__":
    main()
