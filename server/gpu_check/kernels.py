"""Kernels alone: are they right, and how close do they come to what the device can move and multiply?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import torch

from slipstream.kernels.cases import (
    LLAMA_8B,
    MIDDLE,
    TINY,
    TOLERANCE,
    Case,
    Source,
    cases,
    difference,
)
from slipstream.kernels.triton import launch
from slipstream.server.gpu_check.context import Context, NotThere, Part
from slipstream.server.gpu_check.timing import seconds

COPY = "bytes per second of a copy"
MULTIPLY = "flops per second of a product"
WANTED_SHARE = 0.8
"""The share of the copy's bandwidth that attention of 32 streams over 8k tokens each is to reach."""


@cache
def mend_interpreter() -> None:
    """Has Triton's interpreter, where it stands in for a GPU, do two things that it does wrong or not at all."""
    if launch.is_interpreted():
        _round_to_nearest()
        if version("triton").startswith("3.6."):
            _take_loaded_bounds()


def _round_to_nearest() -> None:
    """Numbers of 8 bits are rounded as a GPU does it: to the nearest one, the even one of two."""
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        if source.dtype.scalar != language.float32 or kind.scalar != language.float8e4nv:
            return convert(self, source, kind, rounding)
        rounded = torch.tensor(source.data).to(torch.float8_e4m3fn).view(torch.uint8)
        return TensorHandle(rounded.numpy(), kind.scalar)

    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def _take_loaded_bounds() -> None:
    """A loop may have a bound that was loaded: an array of one number, which numpy 2.4 does not take for a number."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_tensor


def correctness(context: Context) -> Iterator[Part]:
    """Against the reference. Without a GPU not in bfloat16: the interpreter's is not that of a GPU."""
    sizes = TINY if context.dry_run else MIDDLE
    mend_interpreter()
    yield Part("Triton", partial(_starts, context))
    tried = [(case, dtype) for case in cases(context.device) for dtype in case.dtypes]
    if context.dry_run:
        tried = [(case, dtype) for case, dtype in tried if dtype is _exact(case)]
    # First each in the format that matters most: compiling takes longer than running.
    for case, dtype in sorted(tried, key=lambda each: each[0].dtypes.index(each[1])):
        yield Part(f"{case.name}, {_name(dtype)}", partial(_compare, context, case, dtype, sizes))


def _starts(context: Context) -> None:
    """Whether Triton's kernels are among those that are compared: torch's are used without them, and much is slower."""
    why_not = launch.why_not(context.device.type)
    if why_not and (context.dry_run or launch.too_old()):
        raise NotThere(why_not)
    context.check("Triton's kernels run", not why_not, why_not or "they do", "they do")


def _compare(context: Context, case: Case, dtype: torch.dtype, sizes: object) -> None:
    prepared = case.prepare(Source(context.device, dtype), sizes)  # type: ignore[arg-type]
    found = difference(prepared.found(), prepared.expected())
    most = TOLERANCE[dtype]
    context.check(f"{case.name}, {_name(dtype)}", found <= most, f"differs by {found:.2g}", f"at most {most:.2g}")
    context.row("differences from the reference", kernel=case.name, dtype=_name(dtype), difference=found, most=most)


def speed(context: Context) -> Iterator[Part]:
    """First what the device can do at most, then every kernel with the sizes of an 8B model."""
    mend_interpreter()
    yield Part("copy", partial(_copy, context))
    yield Part("product", partial(_multiply, context))
    for case in cases(context.device):
        dtype = case.dtypes[0] if context.on_gpu else _exact(case)
        yield Part(case.name, partial(_time, context, case, dtype))


def copied_per_s(context: Context) -> float:
    """Bytes per second of a copy, which is measured where no stage has done so."""
    if COPY not in context.kept:
        _copy(context)
    return context.kept[COPY]


def _copy(context: Context) -> None:
    size = 1 << 30 if context.on_gpu else 1 << 20
    source = torch.zeros(size, dtype=torch.int8, device=context.device)
    target = torch.empty_like(source)
    context.keep(COPY, 2 * size / seconds(lambda: target.copy_(source), context.device))
    context.row("ceilings", what="a copy, read and written", GB_per_s=context.kept[COPY] / 1e9)


def _multiply(context: Context) -> None:
    size, dtype = (8192, torch.bfloat16) if context.on_gpu else (64, torch.float32)
    a, b = torch.randn(2, size, size, device=context.device).to(dtype)
    context.keep(MULTIPLY, 2 * size**3 / seconds(lambda: a @ b, context.device))
    context.row("ceilings", what=f"a product of {size}², {_name(dtype)}", TFLOP_per_s=context.kept[MULTIPLY] / 1e12)


def _time(context: Context, case: Case, dtype: torch.dtype) -> None:
    most_s = 0.3 if context.on_gpu else 0.0
    prepared = case.prepare(Source(context.device, dtype), LLAMA_8B if context.on_gpu else TINY)
    took = seconds(prepared.run, context.device, most_s)
    copy, multiply = copied_per_s(context), context.kept.get(MULTIPLY)
    context.row(
        "kernels",
        kernel=case.name,
        dtype=_name(dtype),
        µs=took * 1e6,
        GB_per_s=prepared.moved / took / 1e9,
        of_the_copy=prepared.moved / took / copy,
        TFLOP_per_s=prepared.flops / took / 1e12 if prepared.flops else None,
        of_the_product=prepared.flops / took / multiply if prepared.flops and multiply else None,
    )
    if case.name.startswith("attention decode"):
        what = f"{case.name}, {LLAMA_8B.streams} streams × {LLAMA_8B.context}: share of the copy's bandwidth"
        context.target(what, prepared.moved / took / copy, at_least=WANTED_SHARE)


def _exact(case: Case) -> torch.dtype:
    """A format of the case's that the interpreter computes as a GPU does."""
    return torch.float32 if torch.float32 in case.dtypes else torch.float16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
