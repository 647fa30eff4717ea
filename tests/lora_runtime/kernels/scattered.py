"""An adapter memory filled by hand: parts at scattered places, NaN in between."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_runtime.kernels import AdapterMemory, Extent

GAP = 5


class Scattered:
    """Collects the parts of runs; `memory(dtype)` holds them, everything else is NaN."""

    def __init__(self) -> None:
        self._floats: list[Tensor] = [torch.full((GAP,), float("nan"), dtype=torch.float64)]
        self._ints: list[Tensor] = [torch.full((GAP,), 7)]

    def extent(self, *, a=None, b=None, gain=None, bias=None, rows=None, row_ids=None) -> Extent:
        """a (r, in), b (r, out), gain and bias (out,), rows (n, width), row_ids (n,)."""
        return Extent(
            rank=0 if a is None else len(a),
            a=self._put(self._floats, a),
            b=self._put(self._floats, b),
            gain=self._put(self._floats, gain),
            bias=self._put(self._floats, bias),
            num_rows=0 if rows is None else len(rows),
            rows=self._put(self._floats, rows),
            row_ids=self._put(self._ints, row_ids),
        )

    def memory(self, dtype: torch.dtype) -> AdapterMemory:
        floats = torch.cat(self._floats)
        return AdapterMemory(floats.to(dtype), floats.float(), torch.cat(self._ints).int())

    @staticmethod
    def _put(parts: list[Tensor], part: Tensor | None) -> int:
        if part is None:
            return -1
        offset = sum(map(len, parts))
        gap = parts[0]
        parts.extend([part.flatten().to(gap.dtype), gap])
        return offset


def table(extents: list[list[Extent]]) -> Tensor:
    """(S, R, 8) int64."""
    return torch.tensor(extents, dtype=torch.int64)
