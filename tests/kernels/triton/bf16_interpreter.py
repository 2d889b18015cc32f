"""Mends Triton's interpreter where it computes narrow formats in another way than a GPU does; importing it is enough.

The interpreter keeps a bfloat16 as the 16 bits that it has in memory. Conversions know that, but cut bits off where
hardware rounds to the nearest even number, and ``tl.dot`` multiplies the bits themselves. Kernels widen to float32
right after loading, so that these two are all that is left to mend. With Triton 3.6, numpy 2.4 refuses a loop bound
that a kernel loaded, which is an array of one number.

Numbers of 8 bits it rounds wrongly; hardware rounds to the nearest even one, and what is too large to the largest.

It is quick, too: see quick_interpreter.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import quick_interpreter  # noqa: F401  (hastens it)
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter


def rounded(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 of each number, ties to even; no number stays none."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    with np.errstate(over="ignore"):
        kept = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), kept).astype(np.uint16)


def widened(handle: Any) -> Any:
    """A bfloat16 operand as the float32 that it stands for; any other as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded_to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """The bits of the nearest float8_e4m3fn of each number, ties to even; no number stays none."""
    with torch._C.DisableTorchFunction():  # what tests count is what the engine does
        wide = torch.from_numpy(np.ascontiguousarray(values, np.float32)).clamp(-448, 448)
        return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def mend() -> None:
    builder = interpreter.InterpreterBuilder
    cast, dot, tensors = builder.cast_impl, builder.create_dot, interpreter._patch_lang_tensor
    convert = builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return interpreter.TensorHandle(rounded(source.data), tl.bfloat16)
        return cast(self, source, kind)

    def create_fp_to_fp(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        if source.dtype.scalar in (tl.float32, tl.float16) and kind.scalar == tl.float8e4nv:
            return interpreter.TensorHandle(rounded_to_8_bits(source.data), tl.float8e4nv)
        return convert(self, source, kind, rounding)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = widened(a), widened(b)
        if d.dtype.scalar != tl.float32 or np.uint8 in (a.data.dtype, b.data.dtype):
            return dot(self, a, b, d, *rest)
        # numpy sums a row in an order that depends on its place; a GPU does not. Not so to float32's precision.
        exact = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(exact.astype(np.float32), tl.float32)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        tensors(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    interpreter._patch_lang_tensor = patch_tensor


def silence() -> None:
    """Infinities are no reason to warn, as numpy does."""
    launch = interpreter.GridExecutor.__call__

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):
            launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = run


mend()
silence()
