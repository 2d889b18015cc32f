"""``slipstream doctor``: what would run on this machine, why, and what is missing.

A section is a title and a function that yields facts; another one is a function and a line in ``SECTIONS``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.kernels.stored import Quantize

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Fact:
    name: str
    value: str
    advice: str = ""
    """What to do, where something is missing."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the machine is looked at for."""

    model: str | None
    device: torch.device
    quantize: Quantize = "none"


def doctor(
    model: Annotated[
        str | None, typer.Option(help="For this model, as for serve; by default for one of Llama's shape in bfloat16.")
    ] = None,
    quantize: Annotated[Quantize, typer.Option(help="As for serve.")] = "none",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what would run on this machine, why, and what is missing."""
    from slipstream.engine.config import EngineConfig
    from slipstream.engine.models.loader import find_device  # imports torch

    asked = Asked(model, find_device(EngineConfig()), quantize)
    found = {title: list(facts(asked)) for title, facts in SECTIONS.items()}
    if as_json:
        print(json.dumps({title: [asdict(fact) for fact in facts] for title, facts in found.items()}, indent=2))
        return
    for title, facts in found.items():
        print(title)
        for fact in facts:
            print(f"  {fact.name}: {fact.value}")
            if fact.advice:
                print(f"    → {fact.advice}")


def processor(asked: Asked) -> Iterator[Fact]:
    """The CPU, and the kernels for it."""
    from slipstream.engine.limits import free_memory, usable_cores
    from slipstream.kernels.native import library
    from slipstream.server.gpu_check.machine import processor as name

    yield Fact("processor", f"{name()}, {usable_cores()} usable of {os.cpu_count()} cores")
    yield Fact("free memory", f"{free_memory() / 2**30:.1f} GiB")
    native = library.load()
    if native is None:
        yield Fact(
            "compiled kernels",
            "none: torch computes on the CPU",
            "install a C++ compiler and install Slipstream again, on a processor with AVX2 or a 64-bit ARM one",
        )
    else:
        runs = [name for name, here in library.variants().items() if here]
        yield Fact("compiled kernels", f"{library.isa()}, chosen of {', '.join(runs)}")
        if others := [name for name, here in library.variants().items() if not here]:
            yield Fact("not for this processor", ", ".join(others))
        yield from _limits(usable_cores(), free_memory())


def _limits(cores: int, free: int) -> Iterator[Fact]:
    """What bounds a step: measured, with all cores, in half a second."""
    import torch

    from slipstream.kernels.native import limits
    from slipstream.kernels.native.stack import NativeCompute

    NativeCompute.set_threads(cores)
    if free > 2 * limits.LARGEST:
        yield Fact("reads memory at", f"{limits.read_bandwidth() / 1e9:.1f} GB/s: what few streams are bound by")
    formats = (torch.bfloat16, torch.float32, torch.int8)
    peaks = [f"{limits.peak_flops(each) / 1e9:,.0f} in {str(each).removeprefix('torch.')}" for each in formats]
    yield Fact("computes at most", f"{', '.join(peaks)} (10^9 operations per second): what prompts are bound by")


def weights(asked: Asked) -> Iterator[Fact]:
    """How the weights of the model would be kept."""
    from slipstream.engine.config import EngineConfig
    from slipstream.engine.errors import SlipstreamError
    from slipstream.engine.models.loader import weights_here

    config = EngineConfig(model=asked.model or EngineConfig().model, quantize=asked.quantize)
    try:
        form, because = weights_here(config)
    except SlipstreamError as error:
        yield Fact(config.model, "not known", str(error))
    else:
        yield Fact(config.model, f"{form}: {because}")


def gpu(asked: Asked) -> Iterator[Fact]:
    """The GPU, and whether Triton's kernels run on it."""
    import torch

    from slipstream.kernels.triton import launch
    from slipstream.server.gpu_check.machine import driver

    if asked.device.type != "cuda":
        has_cuda = torch.version.cuda or torch.version.hip
        advice = "" if has_cuda else "where there is a GPU, install a build of torch for it: this one is for CPUs"
        yield Fact("GPU", "torch sees none", advice)
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        what = f"{device.name}, {device.total_memory / 2**30:.1f} GiB, compute capability {device.major}.{device.minor}"
        yield Fact(f"GPU {index}", what)
    yield Fact("driver", driver())
    why_not = launch.why_not("cuda")
    yield Fact("Triton's kernels", "do not run" if why_not else "run", why_not)


def versions(asked: Asked) -> Iterator[Fact]:
    """Versions of what computes, or would if it was installed."""
    from slipstream.kernels.attention.choice import TABLE, missing
    from slipstream.server.gpu_check.machine import PACKAGES, installed

    for package in PACKAGES:
        yield Fact(package, installed(package) or "not installed")
    for entry in TABLE if asked.device.type == "cuda" else ():
        if entry.package and (why := missing(entry.name)):
            yield Fact(f"attention by {entry.name}", "not there", why)


def attention(asked: Asked) -> Iterator[Fact]:
    """What computes attention, and why the others do not."""
    import torch

    from slipstream.engine.checkpoint.checkpoint import open_checkpoint
    from slipstream.engine.config import EngineConfig
    from slipstream.engine.models.attention import attention_wanted
    from slipstream.kernels.attention.choice import NoAttentionError, against, choose, wanted
    from slipstream.kernels.compute import Formats
    from slipstream.kernels.kv_cache import CacheShape

    if asked.device.type != "cuda":
        yield Fact("chosen", "that of the kernels for the CPU, which go with their layout of the cache")
        yield Fact("caches of 8 bits", "int8 and fp8 (--kv-cache-dtype)")
        return
    of = wanted(CacheShape(1, 16, 8, 128, torch.bfloat16), torch.bfloat16, asked.device)
    if asked.model is not None:
        formats = Formats.of(torch.bfloat16)
        of = attention_wanted(open_checkpoint(asked.model).config, EngineConfig(), formats, asked.device)
    choice = choose(of)
    yield Fact("chosen", f"{choice.name}: {choice.because}")
    for name, why in choice.others.items():
        yield Fact(f"not {name}", why)
    for name, kept in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        why = "; ".join(against("triton", replace(of, kv_dtype=kept)))
        yield Fact(f"with --kv-cache-dtype {name}", f"refused: {why}" if why else "triton")
    try:
        yield Fact("with --deterministic", choose(replace(of, deterministic=True)).name)
    except NoAttentionError as error:
        yield Fact("with --deterministic", f"refused: {error}")


SECTIONS: dict[str, Callable[[Asked], Iterator[Fact]]] = {
    "Processor": processor,
    "Weights": weights,
    "GPU": gpu,
    "Versions": versions,
    "Attention": attention,
}
