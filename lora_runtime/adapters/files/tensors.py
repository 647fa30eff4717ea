"""An adapter's tensors by their meaning, each taken once; what is left over is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from lora_runtime.adapters.files.tensor_names import Part, TensorName, parse_names
from lora_runtime.errors import AdapterRefused

OTHER_BASE = (
    "serve it with its own config on the base that it was made for; another may have other layers, "
    "experts or sizes"
)


class AdapterTensors:
    """Every tensor of one file. Raises AdapterRefused for names that have no meaning."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._keys = parse_names(tensors)
        self._left = set(self._keys)

    @property
    def names(self) -> tuple[TensorName, ...]:
        return tuple(self._keys)

    def pass_over(self, names: Iterable[TensorName]) -> None:
        """Need no meaning for these."""
        self._left.difference_update(names)

    def num_rows(self, name: TensorName) -> int | None:
        """The first size of a tensor, or None where the file has none."""
        key = self._keys.get(name)
        return None if key is None else self._tensors[key].shape[0]

    def shape(self, module: str, part: Part) -> tuple[int, ...] | None:
        """The shape of a tensor, or None where the file has none."""
        key = self._keys.get(TensorName(module, part))
        return None if key is None else tuple(self._tensors[key].shape)

    def take(self, module: str, part: Part, shape: tuple[int, ...]) -> Tensor:
        """The tensor, on the host as the file has it.

        Raises: AdapterRefused where it is missing or of another shape.
        """
        tensor = self.take_if_there(module, part, shape)
        if tensor is None:
            key = f"base_model.model.{module}.{part}"
            raise AdapterRefused(
                f"tensor {key} is missing, though the config asks for it: {OTHER_BASE}",
                field=key,
            )
        return tensor

    def take_if_there(self, module: str, part: Part, shape: tuple[int, ...]) -> Tensor | None:
        """The tensor, or None where the file has none. Raises for another shape."""
        name = TensorName(module, part)
        if name not in self._keys:
            return None
        self._left.discard(name)
        tensor = self._tensors[self._keys[name]]
        if tuple(tensor.shape) != shape:
            raise AdapterRefused(
                f"tensor {self._keys[name]} has shape {tuple(tensor.shape)}; the config and this "
                f"base expect {shape}: {OTHER_BASE}",
                field=self._keys[name],
            )
        return tensor

    def refuse_rest(self) -> None:
        """Raise AdapterRefused if a tensor was never taken."""
        unknown = sorted(self._keys[name] for name in self._left)
        if unknown:
            raise AdapterRefused(
                f"tensor {unknown[0]} belongs to no module that the config adapts on this base "
                f"({len(unknown)} such tensors): {OTHER_BASE}",
                field=unknown[0],
            )
