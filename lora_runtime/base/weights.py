"""What adapters may ask of a base's weights. Nothing dense of a layer's size is made, but for
`serving` and `original`.

W is the serving weight: dequantised and rounded once to the compute dtype. Answers are on the
host, unless they say otherwise, in float32 or better.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_runtime.base.model.quant_linear import ROW_BLOCK, FrozenLinear
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
UNQUANTISED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SQUARED_ROWS = 128
"""Rows that are squared at once: whole blocks of them are so large on a CPU that the system takes
their memory back after each, and gives it out again page by page.
"""


class BaseWeights:
    """The weights of one loaded base, by module path, and the checkpoint they came from. `dtype`:
    the compute dtype, where it is not that of the stored embedding.
    """

    def __init__(
        self, model: nn.Module, spec: BaseSpec, folder: Path, dtype: torch.dtype | None = None
    ) -> None:
        self.folder = folder
        self._dtype = dtype
        self._model = model
        self._spec = spec
        self._squared_norms: dict[str, Tensor] = {}
        self._checkpoint: dict[str, str] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype, to which vocabulary rows are rounded."""
        return self._dtype or self._embedding.dtype

    def squared_norms(self, path: str) -> Tensor:
        """‖w_i‖² of every output row i of W, (out,) float64; computed once a module.

        The embedding is a linear layer of one-hot tokens: its W is the transposed table.
        """
        if path not in self._squared_norms:
            self._squared_norms[path] = self._compute_squared_norms(path)
        return self._squared_norms[path]

    def measure_rows(self) -> None:
        """Compute the norms of every inner linear, so that no DoRA's load has to wait for them; but
        for experts, of whose rows there are hundreds of times as many.
        """
        for path, shape in self._spec.linears.items():
            if shape.experts is None:
                self.squared_norms(path)

    def times_transposed(self, path: str, a: Tensor) -> Tensor:
        """W Aᵀ: a (r, in) float32 → (out, r) float32."""
        if path != self._spec.embedding:
            return self._module(path).times_transposed(a)
        a = a.to(self._embedding.device)
        product = torch.zeros(len(a), self._spec.hidden_size, device=a.device)
        for rows, block in self._blocks(path):
            product += a[:, rows] @ block.float()
        return product.T.cpu()

    def product_of_rows(self, path: str, a: Tensor) -> Tensor:
        """W Aᵀ where the base is and in a's dtype: for training, which needs it at every step.
        a (r, in) float32 or float64 → (out, r).
        """
        if path == self._spec.embedding:
            return (a @ self._embedding.to(a.dtype)).T
        return self._module(path).kept_values().to(a.dtype) @ a.T

    def serving(self, path: str) -> Tensor:
        """W (out, in) of an inner linear, dense, in float32 or better, where the base is."""
        values = self._module(path).weight_values().detach()
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def expert(self, path: str, expert: int) -> Tensor:
        """W (out, in) of one expert of a mixture, dense, in float32 or better, on the host."""
        num_experts = self._spec.linears[path].num_experts
        values = self._module(path).group_values(expert, num_experts).detach()
        return values.to(torch.promote_types(values.dtype, torch.float32)).cpu()

    def bias(self, path: str) -> Tensor | None:
        """The module's own bias (out,), of experts (E · out,), in float32, or None."""
        if path == self._spec.embedding:
            return None
        bias = self._module(path).bias
        return None if bias is None else bias.detach().float().cpu()

    def vocabulary_rows(self, path: str, rows: slice) -> Tensor:
        """Rows of the embedding's or head's weight, (n, hidden) in the compute dtype."""
        is_embedding = path == self._spec.embedding
        weight: Any = self._embedding if is_embedding else self._module(path).weight
        return weight.detach()[rows].to(self.dtype).cpu()

    def original(self, path: str) -> Tensor:
        """The module's weight (out, in) as the checkpoint stores it, before quantisation.

        Raises: AdapterRefused if the base's folder holds no such tensor, or quantised codes of it.
        """
        name = f"{path}.weight"
        file = self._checkpoint_files().get(name)
        if file is not None:
            with safe_open(self.folder / file, framework="pt") as checkpoint:
                weight: Tensor = checkpoint.get_tensor(name)
            if weight.dtype in UNQUANTISED_DTYPES:
                return weight
        raise AdapterRefused(
            f"the 16-bit weight {name} is needed to undo the adapter's initialisation, and the "
            f"base {self._spec.name} was not loaded from a safetensors checkpoint that has it; "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion",
            field="init_lora_weights",
        )

    @property
    def _embedding(self) -> Tensor:
        embedding: Any = self._model.get_submodule(self._spec.embedding)
        return embedding.weight.detach()

    def _module(self, path: str) -> FrozenLinear:
        module: Any = self._model.get_submodule(path)
        frozen: FrozenLinear = getattr(module, "linear", module)
        return frozen

    def _blocks(self, path: str) -> Iterator[tuple[slice, Tensor]]:
        """Yield W, or the embedding's table, some rows at a time."""
        if path != self._spec.embedding:
            yield from self._module(path).row_blocks()
            return
        for start in range(0, len(self._embedding), ROW_BLOCK):
            rows = slice(start, start + ROW_BLOCK)
            yield rows, self._embedding[rows]

    def _compute_squared_norms(self, path: str) -> Tensor:
        of_table = path == self._spec.embedding
        parts = [
            part.to(torch.promote_types(part.dtype, torch.float32))
            .square()
            .sum(0 if of_table else 1, dtype=torch.float64)
            for _, block in self._blocks(path)
            for part in block.split(SQUARED_ROWS)
        ]
        return (torch.stack(parts).sum(0) if of_table else torch.cat(parts)).cpu()

    def _checkpoint_files(self) -> dict[str, str]:
        """Tensor name → file of the base's folder; empty without a safetensors checkpoint."""
        if self._checkpoint is None:
            self._checkpoint = _read_index(self.folder)
        return self._checkpoint


def _read_index(folder: Path) -> dict[str, str]:
    if (folder / INDEX_FILE).is_file():
        return dict(json.loads((folder / INDEX_FILE).read_text())["weight_map"])
    try:
        with safe_open(folder / SINGLE_FILE, framework="pt") as checkpoint:
            return dict.fromkeys(checkpoint.keys(), SINGLE_FILE)
    except (OSError, SafetensorError):
        return {}
