"""Where the Triton backend is tested: on a GPU if there is one, else in the interpreter.

The interpreter of Triton 3.7.1 cuts float32 to bfloat16 instead of rounding, and multiplies the
bit patterns of bfloat16 matrices as integers: both are put right here.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from lora_runtime.kernels import AdapterMemory, StepMeta, gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _mend_interpreter() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    multiply = interpreter.InterpreterBuilder.create_dot

    def rounding(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        values = torch.from_numpy(np.array(data, np.float32)).bfloat16()
        return values.view(torch.int16).numpy().view(np.uint16)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    interpreter._convert_float = rounding
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: multiply(
        self, widened(a), widened(b), *rest
    )


if DEVICE == "cpu":
    _mend_interpreter()


def on_device(value):
    """A tensor, or a table of tensors, moved to DEVICE; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, AdapterMemory | StepMeta):
        names = [f.name for f in dataclasses.fields(value) if f.name != "derived"]
        return type(value)(**{name: on_device(getattr(value, name)) for name in names})
    return value


def apply_adapters(*arguments):
    """The Triton backend's op on DEVICE, its result back on the host."""
    return gpu.apply_adapters(*map(on_device, arguments)).cpu()
