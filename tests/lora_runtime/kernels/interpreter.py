"""Puts right what Triton's interpreter (3.7.1) does wrong, and what makes it slow.

Wrong: float32 is cut to bfloat16 instead of rounded, and matrices of bfloat16 are multiplied as the
integers of their bits. Slow: every launch wraps the whole language anew, every value's type and
shape is made anew, and every whole number is watched for an overflow that small shapes cannot have;
together that is two thirds of the time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """For the whole process; more than once does no harm."""
    if interpreter._patch_lang is not _wrap_once:
        _round_bfloat16()
        _widen_bfloat16_products()
        _remember_types()
        interpreter._patch_lang = _wrap_once
        builder = interpreter.interpreter_builder
        builder.options = replace(builder.options, sanitize_overflow=False)


def _round_bfloat16() -> None:
    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        values = torch.from_numpy(np.array(data, np.float32)).bfloat16()
        return values.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = rounding


def _widen_bfloat16_products() -> None:
    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: multiply(
        self, widened(a), widened(b), *rest
    )


_wrap = interpreter._patch_lang
_wrapped: set[str] = set()


def _wrap_once(function):
    """The language stays wrapped from a module's first kernel on; nothing is to be restored."""
    module = function.__globals__["__name__"]
    if module not in _wrapped:
        _wrapped.add(module)
        _wrap(function)
    return interpreter._LangPatchScope()


def _remember_types() -> None:
    np_dtype, make_type = interpreter._get_np_dtype, tl.block_type.__init__
    np_dtypes = cache(lambda name, dtype: np_dtype(dtype))
    types: dict[tuple, dict] = {}

    def np_dtype_of(dtype):
        scalar = dtype.scalar
        return np.dtype(np.uint64) if scalar.is_ptr() else np_dtypes(scalar.name, scalar)

    def block_type(self, element_ty, shape):
        key = (str(element_ty), *map(int, shape))
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(self.__dict__)
        self.__dict__.update(types[key])

    shapes = cache(lambda *shape: _shape_and_size(shape))

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes(*type.shape) if type.is_block() else shapes()

    interpreter._get_np_dtype = np_dtype_of
    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor


def _shape_and_size(shape):
    return tl.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(int(np.prod(shape, dtype=int)))
