"""Compile every Triton kernel for a GPU that need not be there; run by test_gpu_compilation.py.

The interpreter takes no types and no layouts; the compiler does. Addresses, strides and sizes are
multiples of 16, as in most models: only then are copies wide, and staged in shared memory. Prints
one line a kernel.
"""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_runtime.kernels import (
    gpu_adapter_kernels,
    gpu_attention,
    gpu_attention_kernels,
    gpu_elementwise,
    gpu_quantised_kernels,
    gpu_vocabulary,
)

TARGET = GPUTarget("cuda", 90, 32)
ACTIVATIONS = {
    "x_ptr", "y_ptr", "base_ptr", "bias_ptr", "values_ptr", "weights_ptr", "q_ptr", "k_ptr",
    "v_ptr", "keys_ptr", "out_ptr", "weight_ptr", "gate_ptr", "up_ptr", "cos_ptr", "sin_ptr",
    "out_q_ptr", "out_k_ptr", "total_ptr", "residual_ptr",
}  # fmt: skip
FLOATS = {
    "code_ptr",
    "offset_ptr",
    "hidden_ptr",
    "vectors_ptr",
    "scales_ptr",
    "absmax_ptr",
    "table_ptr",
    "partial_ptr",
}
SCALARS = {"scale": "fp32", "softcap": "fp32", "eps": "fp32", "embed_scale": "fp32"}
SIZES = {"head_dim", "width", "in_features", "out_features"}
TILE = {"BLOCK_M": 16, "BLOCK_R": 16, "ALIGNMENT": 8}


def element(name: str, codes: str, floats: str) -> str:
    if name in ACTIVATIONS:
        return floats
    if name in FLOATS:
        return "fp32"
    return {"codes_ptr": codes, "packed_ptr": "u8", "runs_ptr": "i64"}.get(name, "i32")


def compile_kernel(kernel, codes: str = "u8", floats: str = "bf16", **constants) -> None:
    signature = {
        name: "constexpr"
        if name in constants
        else f"*{element(name, codes, floats)}"
        if name.endswith("_ptr")
        else SCALARS.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or name.startswith("stride_") or name in SIZES
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=TARGET)
    print(kernel.__name__, len(compiled.asm["cubin"]), compiled.metadata.shared)


compile_kernel(gpu_adapter_kernels.tiles_kernel, BLOCK_M=16, CHUNK=64)
compile_kernel(gpu_adapter_kernels.shrink_kernel, **TILE, BLOCK_K=64)
compile_kernel(
    gpu_adapter_kernels.expand_kernel,
    **TILE, HAS_BIAS=True, SPLITS=4, BLOCK_N=64, VECTOR_ALIGNMENT=4,
)  # fmt: skip
for name, codes in (("four_bit", "u8"), ("int8", "i8")):
    compile_kernel(
        gpu_quantised_kernels.product_kernel, codes,
        FORMAT=name, GATE="", IS_EVEN=True, SPLITS=4, TILES=2, BLOCK_M=8, BLOCK_N=128, BLOCK_K=256,
    )  # fmt: skip
compile_kernel(gpu_quantised_kernels.scales_kernel, BLOCK=1024)
compile_kernel(gpu_quantised_kernels.values_kernel, IS_NESTED=False, BLOCK=1024)
compile_kernel(gpu_attention_kernels.write_kv_kernel, BLOCK=1024)
for dtype, block_d in ((torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 128)):
    floats = "fp32" if dtype == torch.float32 else "bf16"
    q, (block_q, num_bytes) = torch.empty(0, dtype=dtype), gpu_attention.PREFILL_TILES[dtype]
    decode_keys, prefill_keys = (
        gpu_attention.tile_keys(q, block_d, n) for n in (gpu_attention.DECODE_BYTES, num_bytes)
    )
    kinds = {"HAS_WINDOW": True, "HAS_SOFTCAP": True, "BLOCK_SIZE": 16, "BLOCK_D": block_d}
    compile_kernel(
        gpu_attention_kernels.decode_kernel, floats=floats, **kinds,
        IS_DECODE=True, SPLITS=4, MIN_SHARE=128, BLOCK_H=16, BLOCK_K=decode_keys,
    )  # fmt: skip
    compile_kernel(
        gpu_attention_kernels.prefill_kernel, floats=floats, **kinds,
        BLOCK_Q=block_q, CHUNK=64, BLOCK_K=prefill_keys,
    )  # fmt: skip
for block in (128, 4096):
    compile_kernel(
        gpu_elementwise._rms_norm_kernel, PLUS_ONE=False, HAS_RESIDUAL=block == 4096,
        BLOCK_ROWS=max(1, 1024 // block), BLOCK=block,
    )  # fmt: skip
compile_kernel(gpu_elementwise._rotate_kernel, BLOCK_H=4, BLOCK_D=128)
compile_kernel(gpu_elementwise._gated_activation_kernel, IS_SILU=False, BLOCK=1024)
compile_kernel(gpu_vocabulary._embed_kernel, BLOCK_N=256, BLOCK_R=16)
for floats in ("bf16", "fp32"):
    compile_kernel(
        gpu_vocabulary._patch_kernel, floats=floats,
        BLOCK_M=16, BLOCK_ROWS=32, BLOCK_K=128, ALIGNMENT=4 if floats == "fp32" else 8,
    )  # fmt: skip
