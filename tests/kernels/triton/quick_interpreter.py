"""Hastens Triton's interpreter, most of whose time goes into what it does over and over; importing it is enough.

No result is another, and two thirds of the time are saved.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """A kernel that calls a function prepares the language for it, which takes milliseconds: here once per function,
    not with every call. Types of blocks are made once for each shape, with the shape that their tensors show. Sums of
    integers are not computed a second time to see whether they overflow: without ``debug`` nobody looks at that.
    """
    prepared: set[Any] = set()

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if self.fn not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn)
        return self.rewrite()(*args, **options)

    interpreter.InterpretedFunction.__call__ = call
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)

    core = tl.core
    make_block, equal, blocks = core.block_type.__init__, core.dtype.__eq__, dict[Any, dict[str, Any]]()
    no_shape, one = core.tuple(()), core.constexpr(1)

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        shape = shape.value if isinstance(shape, core.constexpr) else shape
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        key = element_ty.name, getattr(element_ty, "address_space", None), sizes
        if key not in blocks:
            make_block(self, element_ty, shape)
            self.of_tensors = core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(self.numel)
            blocks[key] = dict(self.__dict__)
        self.__dict__ |= blocks[key]

    def init_tensor(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = kind.of_tensors if kind.is_block() else (no_shape, one)

    def equal_types(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__ = init_block, init_tensor, equal_types

    find_numpy, found = interpreter._get_np_dtype, dict[str, Any]()

    def numpy_type(kind: Any) -> Any:
        kind = kind.element_ty if kind.is_block() else kind
        if kind.name not in found:
            found[kind.name] = find_numpy(kind)
        return found[kind.name]

    interpreter._get_np_dtype = numpy_type

    semantic = interpreter.TritonSemantic
    broadcast = semantic.broadcast_impl_value

    def broadcast_values(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_values


hasten()
