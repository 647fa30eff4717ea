"""Linear layers of the frozen base: packed 4-bit (bitsandbytes' NF4 and FP4 formats) or dense.

The packed codes and absmax are canonical and never change; a dense copy is a private cache.
bitsandbytes' own Linear4bit is not used: on some CPUs it repacks its weight in place at the first
evaluation, after which dequantisation and gradients through it are silently wrong.
Source: QLoRA, arXiv:2305.14314.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal, Self

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_runtime.kernels import (
    NestedScales,
    PooledAdapters,
    can_dequantize,
    can_multiply_codes,
    can_multiply_dense,
    can_multiply_groups,
    can_quantize,
    can_shrink_with_product,
    can_use_panels,
    dense_product,
    four_bit_gated_product,
    four_bit_product,
    four_bit_product_and_shrink,
    four_bit_values,
    gated_activation,
    grouped_dense_product,
    grouped_four_bit_product,
    pack_panels,
    panel_product,
    quantize_four_bit,
    refuse_recording,
    unrecorded,
)

BLOCK_SIZE = 64
"""Weights that share one absmax."""
NESTED_BLOCK_SIZE = 256
"""absmax values that share a second one in double quantisation."""
QUANTIZED_AT_ONCE = 1 << 18
"""Weights that are quantised at once, whole blocks: bitsandbytes takes 20 bytes for each."""
ROW_BLOCK = 512
"""Rows that are dequantised at once: a multiple of BLOCK_SIZE, so that no absmax is split."""


class FrozenLinear(nn.Module):
    """A linear layer of the base: `product` is W x without the bias, differentiable in x only.

    With `keep_copies` private copies of W in the forms that kernels like stay in memory, where no
    kernel reads W as it is.
    """

    in_features: int
    out_features: int
    bias: Tensor | None

    def __init__(self, *, keep_copies: bool) -> None:
        super().__init__()
        self.keep_copies = keep_copies
        self._dense: Tensor | None = None
        self._panels: dict[int, Tensor] = {}
        """Copies in panels, by the number of groups whose rows begin with a panel."""

    def product(self, x: Tensor) -> Tensor:
        """W x: x (..., in) → (..., out), in the compute dtype."""
        if self.keep_copies and can_use_panels(x):
            return panel_product(x, self._kept_panels(), self.out_features)
        product: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return product

    def is_compiled_for(self, x: Tensor) -> bool:
        """True when `product` of x, in the compute dtype, runs in the CPU's compiled library."""
        return self._reads_codes(x) or (self.keep_copies and can_use_panels(x))

    def _reads_codes(self, x: Tensor) -> bool:
        """True when a kernel multiplies x by the codes themselves."""
        return False

    def grouped_product(self, x: Tensor, starts: Tensor) -> Tensor:
        """`product` where groups of rows are multiplied by parts of W: x (P, in) → (P, out / G).

        Rows starts[g] to starts[g + 1] of x, starts (G + 1,) int32, are multiplied by the g-th of G
        equal parts of W's rows. Parts without rows are not read.
        """
        refuse_recording()  # the sizes of the groups are read here
        product: Tensor = _GroupedProduct.apply(x, self, starts.tolist())  # type: ignore[no-untyped-call]
        return product

    def product_of_group(self, x: Tensor, group: int, num_groups: int) -> Tensor:
        """One part of `grouped_product`."""
        if self.keep_copies and can_use_panels(x):
            own = self._kept_panels(num_groups).chunk(num_groups)[group]
            return panel_product(x, own, self.out_features // num_groups)
        return F.linear(x, self.group_values(group, num_groups))

    def group_values(self, group: int, num_groups: int) -> Tensor:
        """The g-th of G equal parts of `weight_values`: (out / G, in)."""
        height = self.out_features // num_groups
        rows = slice(group * height, (group + 1) * height)
        return self.kept_values()[rows] if self.keep_copies else self.row_values(rows)

    def product_and_shrink(
        self, x: Tensor, adapters: PooledAdapters
    ) -> tuple[Tensor, Tensor | None]:
        """`product` of x (T, in), and what its adapters' ops take as `hidden`: A x where one launch
        makes both, else None.
        """
        return self.product(x), None

    def tracked_product(self, x: Tensor) -> Tensor:
        """W x by the same sums whether or not a gradient is wanted."""
        return F.linear(x, self.kept_values())

    def weight_values(self) -> Tensor:
        """W (out, in) in the compute dtype."""
        raise TypeError(f"{type(self).__name__} has no weight")

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield all rows of `weight_values`, some at a time, with where they are."""
        for start in range(0, self.out_features, ROW_BLOCK):
            rows = slice(start, min(start + ROW_BLOCK, self.out_features))
            yield rows, self.row_values(rows)

    def times_transposed(self, a: Tensor) -> Tensor:
        """W Aᵀ: a (r, in) float32 → (out, r) float32 on the host, without making W."""
        if self._reads_codes(a):
            return self.product(a).T.cpu()
        if (panels := self._panels.get(1)) is not None:
            return panel_product(a, panels, self.out_features).T
        products = [block.float() @ a.to(block.device).T for _, block in self.row_blocks()]
        return torch.cat(products).cpu()

    def row_values(self, rows: slice) -> Tensor:
        """Rows of `weight_values`; the slice starts where a quantiser's block does: at a multiple
        of ROW_BLOCK, or where a group of rows does.
        """
        raise TypeError(f"{type(self).__name__} has no weight")

    def kept_values(self) -> Tensor:
        """`weight_values`, made once if the layer keeps copies."""
        if self._dense is not None:
            return self._dense
        if not self.keep_copies:
            return self.weight_values()
        with unrecorded():
            self._dense = self.weight_values()
        return self._dense

    def _kept_panels(self, num_groups: int = 1) -> Tensor:
        """W in panels, made once: those of each group of its rows, one after another."""
        if num_groups not in self._panels:
            with unrecorded():
                self._panels[num_groups] = pack_panels(self.weight_values(), num_groups)
        return self._panels[num_groups]

    def __copy__(self) -> Self:
        """A layer in the same memory, whose tensors can be replaced and cast without changing this
        one's, and with no private copies of W.
        """
        copied = type(self).__new__(type(self))
        parameters = {
            name: None if own is None else nn.Parameter(own.detach(), requires_grad=False)
            for name, own in self._parameters.items()
        }
        copied.__dict__ = {
            **self.__dict__,
            "_parameters": parameters,
            "_buffers": dict(self._buffers),
            "_modules": dict(self._modules),
            "_dense": None,
            "_panels": {},
        }
        return copied

    def forward(self, x: Tensor) -> Tensor:
        product = self.product(x)
        return product if self.bias is None else product + self.bias

    def gated_product(self, x: Tensor, kind: str) -> Tensor:
        """act(gate) · up of the two halves of this layer's outputs, see `gated_activation`:
        x (..., in) → (..., out / 2).
        """
        gate, up = self(x).chunk(2, dim=-1)
        return gated_activation(gate, up, kind)

    @property
    def joined_parts(self) -> tuple[str, ...]:
        """Tensors whose rows, one layer's after another's, are the weight of all; none: it cannot
        be joined.
        """
        return ()

    @property
    def resident_bytes(self) -> int:
        """Bytes that the weight takes now, private copies included."""
        canonical = [part for name, part in self.state_dict().items() if name != "bias"]
        copies = [*self._panels.values(), *([] if self._dense is None else [self._dense])]
        return sum(part.nbytes for part in (*canonical, *copies))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """Follow a move or a cast: quantised codes and their scales are moved and never cast,
        private copies are made anew.
        """
        exact = {name: b for name, b in self.named_buffers(recurse=False) if name != "bias"}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        self._dense, self._panels = None, {}
        return self


class _FrozenProduct(torch.autograd.Function):
    """W x whose backward takes W from the layer again instead of keeping a dense copy alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.tracked_product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.kept_values(), None


class _GroupedProduct(torch.autograd.Function):
    """`grouped_product`, of one group after another; backward takes their parts of W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear, bounds: list[int]) -> Tensor:
        ctx.layer, ctx.bounds = layer, bounds
        return _by_group(x, bounds, layer.product_of_group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        def back(rows: Tensor, *group: int) -> Tensor:
            return rows @ ctx.layer.group_values(*group)

        return _by_group(grad, ctx.bounds, back), None, None


def _by_group(x: Tensor, bounds: list[int], multiply: Callable[..., Tensor]) -> Tensor:
    """`multiply` of each group's rows, its number and that of all, end to end."""
    parts = [
        multiply(x[first:end], group, len(bounds) - 1)
        for group, (first, end) in enumerate(pairwise(bounds))
        if first < end
    ]
    return torch.cat(parts)


class DenseLinear(FrozenLinear):
    """An unquantised layer: weight (out, in) in the compute dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, keep_copies: bool = False) -> None:
        super().__init__(keep_copies=keep_copies)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def joined_parts(self) -> tuple[str, ...]:
        return ("weight",)

    def product(self, x: Tensor) -> Tensor:
        if can_multiply_dense(x):
            return dense_product(x, self.weight)
        return super().product(x)

    def is_compiled_for(self, x: Tensor) -> bool:
        return can_multiply_dense(x) or super().is_compiled_for(x)

    def grouped_product(self, x: Tensor, starts: Tensor) -> Tensor:
        if can_multiply_groups(x, is_dense=True):
            return grouped_dense_product(x, starts, self.weight)
        return super().grouped_product(x, starts)

    def weight_values(self) -> Tensor:
        return self.weight.detach()

    def kept_values(self) -> Tensor:
        return self.weight_values()  # no copy

    def row_values(self, rows: slice) -> Tensor:
        return self.weight[rows]


class QuantLinear(FrozenLinear):
    """A 4-bit layer. W = fp32(code × absmax), rounded once to the compute dtype.

    packed (out · in / 2,) uint8: two codes a byte, high nibble first; absmax (out · in / 64,)
    float32, or with `is_nested` (double quantisation) 8-bit codes of absmax − offset, (out · in /
    64,) uint8, under a second absmax of 256 codes each. The quantiser's input is the bfloat16
    checkpoint weight, whatever the compute dtype.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    nested_offsets: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        keep_copies: bool = False,
        quant_type: Literal["nf4", "fp4"] = "nf4",
        is_nested: bool = False,
    ) -> None:
        super().__init__(keep_copies=keep_copies)
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.quant_type = quant_type
        self.is_nested = is_nested
        code = bnb.get_4bit_type(quant_type, device=weight.device)
        packed, absmax = _quantized(weight.detach(), quant_type, code)
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.register_buffer("code", code, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach())
        if is_nested:
            self._quantize_scales()

    def _quantize_scales(self) -> None:
        offset = self.absmax.mean()
        self.absmax, state = bnb.quantize_blockwise(
            self.absmax - offset, blocksize=NESTED_BLOCK_SIZE
        )
        self.register_buffer("nested_absmax", state.absmax)
        self.register_buffer("nested_code", state.code, persistent=False)
        self.register_buffer("nested_offset", offset)
        offsets = offset.expand(len(state.absmax)).clone()
        self.register_buffer("nested_offsets", offsets, persistent=False)

    @property
    def joined_parts(self) -> tuple[str, ...]:
        num_blocks, odd = divmod(self.out_features * self.in_features, BLOCK_SIZE)
        if self.in_features % BLOCK_SIZE or odd:
            return ()
        if not self.is_nested:
            return ("packed", "absmax")
        is_whole = num_blocks % NESTED_BLOCK_SIZE == 0
        return ("packed", "absmax", "nested_absmax", "nested_offsets") if is_whole else ()

    def product(self, x: Tensor) -> Tensor:
        if self._reads_codes(x):
            return four_bit_product(
                x, self.packed, self.absmax, self.code, self.out_features, self._nested_scales()
            )
        return super().product(x)

    def product_and_shrink(
        self, x: Tensor, adapters: PooledAdapters
    ) -> tuple[Tensor, Tensor | None]:
        if self._reads_codes(x) and can_shrink_with_product(x, adapters):
            return four_bit_product_and_shrink(
                x, self.packed, self.absmax, self.code, self.out_features, adapters,
                self._nested_scales(),
            )  # fmt: skip
        return super().product_and_shrink(x, adapters)

    def grouped_product(self, x: Tensor, starts: Tensor) -> Tensor:
        if not (self._has_whole_blocks_for(x) and can_multiply_groups(x)):
            return super().grouped_product(x, starts)
        out_features, nested = self.out_features // (len(starts) - 1), self._nested_scales()
        return grouped_four_bit_product(
            x, starts, self.packed, self.absmax, self.code, out_features, nested
        )

    def gated_product(self, x: Tensor, kind: str) -> Tensor:
        if self.bias is None and self._reads_codes(x):
            return four_bit_gated_product(
                x, self.packed, self.absmax, self.code, self.out_features, kind,
                self._nested_scales(),
            )  # fmt: skip
        return super().gated_product(x, kind)

    def _reads_codes(self, x: Tensor) -> bool:
        return self._has_whole_blocks_for(x) and can_multiply_codes(x, is_four_bit=True)

    def _has_whole_blocks_for(self, x: Tensor) -> bool:
        return self.in_features % BLOCK_SIZE == 0 and is_beside(x, self.packed, self.dtype)

    def _nested_scales(self) -> NestedScales | None:
        if not self.is_nested:
            return None
        return NestedScales(self.nested_absmax, self.nested_code, self.nested_offsets)

    def weight_values(self) -> Tensor:
        if not can_dequantize(self.packed):
            return self.dequantize().to(self.dtype)
        size, nested = (self.out_features, self.in_features), self._nested_scales()
        return four_bit_values(self.packed, self.absmax, self.code, size, self.dtype, nested)

    def row_values(self, rows: slice) -> Tensor:
        first, last = rows.start * self.in_features, rows.stop * self.in_features
        packed = self.packed[first // 2 : -(-last // 2)]
        absmax = self.block_scales()[first // BLOCK_SIZE : -(-last // BLOCK_SIZE)]
        rounded = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        return self._dequantized(packed, absmax, rows.stop - rows.start, rounded).to(self.dtype)

    def dequantize(self) -> Tensor:
        """fp32(code × absmax), (out, in) float32."""
        return self._dequantized(self.packed, self.block_scales(), self.out_features, torch.float32)

    def block_scales(self) -> Tensor:
        """The absmax of every block, (out · in / 64,) float32."""
        if not self.is_nested:
            return self.absmax
        state = bnb.QuantState(
            absmax=self.nested_absmax,
            code=self.nested_code,
            blocksize=NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        )
        offsets = self.nested_offsets.repeat_interleave(NESTED_BLOCK_SIZE)[: len(self.absmax)]
        return bnb.dequantize_blockwise(self.absmax, state) + offsets

    def _dequantized(
        self, packed: Tensor, absmax: Tensor, num_rows: int, dtype: torch.dtype
    ) -> Tensor:
        """As one long row where a row of the weight ends inside a block: there bitsandbytes 0.50.2
        misreads absmax on a CPU.
        """
        refuse_recording()  # a tape would keep the values, those of every layer
        size = (num_rows, self.in_features)
        state = bnb.QuantState(
            absmax=absmax,
            shape=torch.Size(size if self.in_features % BLOCK_SIZE == 0 else (1, math.prod(size))),
            code=self.code,
            blocksize=BLOCK_SIZE,
            quant_type=self.quant_type,
            dtype=dtype,
        )
        return bnb.dequantize_4bit(packed[:, None], state).reshape(size)


def is_beside(x: Tensor, codes: Tensor, dtype: torch.dtype) -> bool:
    """True when x is where a layer's codes are and in the layer's compute dtype."""
    return x.dtype == dtype and x.device == codes.device


def _quantized(weight: Tensor, quant_type: str, code: Tensor) -> tuple[Tensor, Tensor]:
    """(packed, absmax) of a weight, some of it at a time: no block depends on another."""
    parts = []
    for some in weight.flatten().split(QUANTIZED_AT_ONCE):
        if can_quantize(some):
            parts.append(quantize_four_bit(some, code))
            continue
        packed, state = bnb.quantize_4bit(
            some.to(torch.bfloat16), blocksize=BLOCK_SIZE, quant_type=quant_type
        )
        parts.append((packed.flatten(), state.absmax))
    codes, scales = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scales)
