"""Puts right what Triton's interpreter (3.7.1) does wrong or lacks, and what makes it slow.

Lacking: PTX; two instructions are given, as the PTX ISA defines them. Wrong: float32 is cut to
bfloat16 instead of rounded; matrices of bfloat16 are multiplied as the integers of their bits; and
numpy sums products in an order that depends on the matrix's shape and the processor, which a GPU's
instructions do not: the sums are made in float64 and rounded once. Slow: every launch wraps the
whole language anew, every value's type and shape is made anew, and every whole number is watched
for an overflow that small shapes cannot have; together that is two thirds of the time.
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
        _sum_products_in_float64()
        _give_instructions()
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


def _sum_products_in_float64() -> None:
    multiply = interpreter.InterpreterBuilder.create_dot

    def values(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return handle.data.astype(np.float64)

    def create_dot(self, a, b, sums, *rest):
        if sums.dtype.scalar != tl.float32:
            return multiply(self, a, b, sums, *rest)
        total = np.matmul(values(a), values(b)) + sums.data
        return interpreter.TensorHandle(total.astype(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _give_instructions() -> None:
    instructions = {
        "prmt.b32 $0, $1, $2, $3;": _permute_bytes,
        "cvt.rn.bf16x2.f32 $0, $2, $1;": _round_pair,
    }

    def create_inline_asm(self, assembly, constraints, values, types, is_pure, pack):
        result = instructions[assembly](*(value.data for value in values))
        return _Results([interpreter.TensorHandle(result, tl.int32)])

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm


class _Results(list):
    """Of an operation."""

    def get_result(self, place):
        return self[place]


def _permute_bytes(a, b, selector):
    """prmt: bytes 0 to 3 are a's, 4 to 7 b's; a nibble's fourth bit repeats the byte's sign."""
    a, b, selector = (
        np.asarray(value).astype(np.uint64) & 0xFFFFFFFF for value in (a, b, selector)
    )
    bytes_of_both, result = a | (b << np.uint64(32)), np.uint64(0)
    for place in range(4):
        nibble = (selector >> np.uint64(4 * place)) & np.uint64(15)
        byte = (bytes_of_both >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte > 127, np.uint64(255), np.uint64(0))
        result = result | (np.where(nibble > 7, sign, byte) << np.uint64(8 * place))
    return result.astype(np.uint32).view(np.int32)


def _round_pair(a, b):
    """cvt.rn.bf16x2.f32: a in the low half."""
    low, high = (
        torch.from_numpy(np.array(value, np.float32)).bfloat16().view(torch.int16).numpy()
        for value in (a, b)
    )
    return low.view(np.uint16) | (high.astype(np.int32) << 16)


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
