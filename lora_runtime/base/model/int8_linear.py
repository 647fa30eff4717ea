"""Linear layers of the frozen base in LLM.int8's weight format: one scale an output row.

Only the weights are quantised. LLM.int8's product is not used: it rounds x to 8 bits and takes the
columns out in which any row of the batch has an outlier, so that rows would change each other.
Source: LLM.int8, arXiv:2208.07339 §2; bitsandbytes 0.50.2, `int8_vectorwise_quant`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_runtime.base.model.quant_linear import ROW_BLOCK, FrozenLinear, is_beside
from lora_runtime.kernels import (
    PooledAdapters,
    can_multiply_codes,
    can_multiply_groups,
    can_shrink_with_product,
    grouped_int8_product,
    int8_product,
    int8_product_and_shrink,
    refuse_recording,
)

MAX_CODE = 127


class Int8Linear(FrozenLinear):
    """An 8-bit layer. W = fp32(code × absmax / 127), rounded once to the compute dtype.

    codes (out, in) int8; absmax (out,) float32. The quantiser's input is the bfloat16 checkpoint
    weight, whatever the compute dtype. Its formula is written out here, because bitsandbytes takes
    float16 alone on a GPU.
    """

    codes: Tensor
    absmax: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, *, keep_copies: bool = False) -> None:
        super().__init__(keep_copies=keep_copies)
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        parts = [_quantized(rows) for rows in weight.detach().split(ROW_BLOCK)]
        codes, absmax = zip(*parts, strict=True)
        self.register_buffer("codes", torch.cat(codes))
        self.register_buffer("absmax", torch.cat(absmax))
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def joined_parts(self) -> tuple[str, ...]:
        return ("codes", "absmax")

    def product(self, x: Tensor) -> Tensor:
        if self._reads_codes(x):
            return int8_product(x, self.codes, self.absmax)
        return super().product(x)

    def grouped_product(self, x: Tensor, starts: Tensor) -> Tensor:
        if is_beside(x, self.codes, self.dtype) and can_multiply_groups(x):
            return grouped_int8_product(x, starts, self.codes, self.absmax)
        return super().grouped_product(x, starts)

    def product_and_shrink(
        self, x: Tensor, adapters: PooledAdapters
    ) -> tuple[Tensor, Tensor | None]:
        if self._reads_codes(x) and can_shrink_with_product(x, adapters):
            return int8_product_and_shrink(x, self.codes, self.absmax, adapters)
        return super().product_and_shrink(x, adapters)

    def _reads_codes(self, x: Tensor) -> bool:
        return is_beside(x, self.codes, self.dtype) and can_multiply_codes(x)

    def weight_values(self) -> Tensor:
        return self.dequantize().to(self.dtype)

    def row_values(self, rows: slice) -> Tensor:
        return self._dequantized(rows).to(self.dtype)

    def dequantize(self) -> Tensor:
        """fp32(code × absmax / 127), (out, in) float32."""
        return self._dequantized(slice(None))

    def _dequantized(self, rows: slice) -> Tensor:
        refuse_recording()  # a tape would keep the values, those of every layer
        return self.codes[rows] * (self.absmax[rows, None] / MAX_CODE)


def _quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, absmax) of some rows of a weight."""
    rounded = rows.to(torch.bfloat16).float()
    absmax = rounded.abs().amax(1)
    codes = torch.round(rounded * (MAX_CODE / absmax[:, None]))
    return codes.nan_to_num(0.0, 0.0, 0.0).to(torch.int8), absmax
