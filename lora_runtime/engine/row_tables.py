"""What the rules of a row read, as tensors on the host that grow with it.

A step hands them to the device as they are, so that no list of thousands of tokens is turned into a
tensor for every token that is drawn.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lora_runtime.core import Row


class RowTables:
    """bias (b, 2) float64: token ids of logit_bias and what is added to their logits."""

    def __init__(self, row: Row) -> None:
        bias = row.request.sampling.logit_bias
        self.bias = torch.tensor(bias, dtype=torch.float64).view(-1, 2)
        self._token_ids = torch.empty(2 * len(row.token_ids), dtype=torch.int64)
        self._num_known = 0

    def token_ids(self, row: Row) -> Tensor:
        """(t,) int64: the row's tokens, prompt and output. The last may be −1 − r; see `Row`."""
        known, total = self._num_known, len(row.token_ids)
        if total > len(self._token_ids):
            grown = torch.empty(2 * total, dtype=torch.int64)
            grown[:known] = self._token_ids[:known]
            self._token_ids = grown
        self._token_ids[known:total] = torch.tensor(row.token_ids[known:], dtype=torch.int64)
        # A token that only the device knows so far is written again at the next step.
        self._num_known = total - (row.token_ids[-1] < 0)
        return self._token_ids[:total]


_tables: WeakKeyDictionary[Row, RowTables] = WeakKeyDictionary()


def tables_of(row: Row) -> RowTables:
    """The tables of a row; they go with it."""
    if row not in _tables:
        _tables[row] = RowTables(row)
    return _tables[row]
