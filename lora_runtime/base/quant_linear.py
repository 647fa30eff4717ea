"""Linear layers of the frozen base: packed 4-bit (bitsandbytes' NF4 format) or dense.

The packed codes and absmax are canonical and never change; a dense copy is a private cache.
bitsandbytes' own Linear4bit is not used: on some CPUs it repacks its weight in place at the first
evaluation, after which dequantisation and gradients through it are silently wrong.
Source: QLoRA, arXiv:2305.14314.
"""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_runtime.kernels import can_use_panels, pack_panels, panel_product

BLOCK_SIZE = 64
"""Weights that share one absmax."""


class FrozenLinear(nn.Module):
    """A linear layer of the base: `product` is W x without the bias, differentiable in x only.

    With `keep_copies` private copies of W in the forms that kernels like stay in memory.
    """

    in_features: int
    out_features: int
    bias: Tensor | None

    def __init__(self, *, keep_copies: bool) -> None:
        super().__init__()
        self.keep_copies = keep_copies
        self._dense: Tensor | None = None
        self._panels: Tensor | None = None

    def product(self, x: Tensor) -> Tensor:
        """W x: x (..., in) → (..., out), in the compute dtype."""
        if self.keep_copies and can_use_panels(x):
            if self._panels is None:
                self._panels = pack_panels(self.weight_values())
            return panel_product(x, self._panels, self.out_features)
        return _FrozenProduct.apply(x, self)

    def weight_values(self) -> Tensor:
        """W (out, in) in the compute dtype."""
        raise TypeError(f"{type(self).__name__} has no weight")

    def kept_values(self) -> Tensor:
        """`weight_values`, made once if the layer keeps copies."""
        if self._dense is not None:
            return self._dense
        values = self.weight_values()
        if self.keep_copies:
            self._dense = values
        return values

    def forward(self, x: Tensor) -> Tensor:
        product = self.product(x)
        return product if self.bias is None else product + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """Follow a move or a cast; private copies are made anew."""
        super()._apply(fn, recurse)
        self._dense = self._panels = None
        return self


class _FrozenProduct(torch.autograd.Function):
    """W x whose backward takes W from the layer again instead of keeping a dense copy alive."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: FrozenLinear) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        return F.linear(x, layer.kept_values())

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad @ ctx.layer.kept_values(), None


class DenseLinear(FrozenLinear):
    """An unquantised layer: weight (out, in) in the compute dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, keep_copies: bool = False) -> None:
        super().__init__(keep_copies=keep_copies)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def weight_values(self) -> Tensor:
        return self.weight


class QuantLinear(FrozenLinear):
    """An NF4 layer. W = fp32(code × absmax), rounded once to the compute dtype.

    packed (out · in / 2,) uint8: two codes a byte, high nibble first; absmax (out · in / 64,)
    float32. The quantiser's input is the bfloat16 checkpoint weight, whatever the compute dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, keep_copies: bool = False) -> None:
        super().__init__(keep_copies=keep_copies)
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        packed, state = bnb.quantize_4bit(
            weight.detach().to(torch.bfloat16), blocksize=BLOCK_SIZE, quant_type="nf4"
        )
        self.register_buffer("packed", packed.flatten())
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("code", state.code, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def weight_values(self) -> Tensor:
        return self.dequantize().to(self.dtype)

    def dequantize(self) -> Tensor:
        """fp32(code × absmax), (out, in) float32."""
        state = bnb.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=BLOCK_SIZE,
            quant_type="nf4",
            dtype=torch.float32,
        )
        return bnb.dequantize_4bit(self.packed[:, None], state)

    @property
    def resident_bytes(self) -> int:
        """Bytes held now, private copies included."""
        copies = [copy for copy in (self._dense, self._panels) if copy is not None]
        return sum(part.nbytes for part in (self.packed, self.absmax, *copies))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Follow a move to another device; keep absmax and code float32 under a cast."""
        absmax, code = self.absmax, self.code
        super()._apply(fn, recurse)
        self.absmax = absmax.to(self.absmax.device)
        self.code = code.to(self.code.device)
        return self
