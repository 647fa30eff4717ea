"""An adapter's road from its folder into an engine: read → reduce → pack → parity → keep.

Each step is a method of `AdapterLoad`, so that a caller can run it where it must run: reading and
packing on any thread, the parity gate on the one that runs the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_runtime.adapters.config.layer_sites import check_depth
from lora_runtime.adapters.files.folder import read_folder
from lora_runtime.adapters.files.parity_record import parse_parity_record
from lora_runtime.adapters.packed_adapter import PackedAdapter, pack_for
from lora_runtime.adapters.parity import (
    Logits,
    Parity,
    ParityRecord,
    compare,
    forwards,
    gate,
    require,
)
from lora_runtime.adapters.reduction import reduce_folder
from lora_runtime.adapters.serving_form import ServingForm
from lora_runtime.base.dtype_view import as_bfloat16_holds
from lora_runtime.base.loader import Base
from lora_runtime.core import ANY_FOLDER, FolderRules
from lora_runtime.engine.client import LoadedAdapter
from lora_runtime.engine.probe import KnownRows, Pause, adapter_logits, no_pause


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLoad:
    """An adapter that was read and reduced for `base`, and is to be packed, checked and kept."""

    base: Base
    form: ServingForm
    record: ParityRecord | None
    """Its logits where it was made; None: it brings no record and is not checked."""
    config: Mapping[str, object]
    """The content of its adapter_config.json."""
    metadata: Mapping[str, str]
    """`__metadata__` of its safetensors file."""

    @classmethod
    def read(cls, folder: Path, base: Base, rules: FolderRules = ANY_FOLDER) -> AdapterLoad:
        """Read a folder, whole and of one moment, and reduce it for `base`.

        Raises AdapterRefused and its kinds, naming the file, field or tensor.
        """
        content = read_folder(folder, rules)
        found = content.parity_record
        return cls(
            base=base,
            form=reduce_folder(content, base.spec, base.weights),
            record=None if found is None else parse_parity_record(found, base.spec),
            config=content.adapter.config,
            metadata=content.adapter.metadata,
        )

    def pack(self, max_layers: int) -> PackedAdapter:
        """Return its bytes as the pool holds them. Raises AdapterRefused for too many layers."""
        check_depth(self.form.facts.layer_map, max_layers)
        return pack_for(self.base, self.form)

    def parity_forwards(
        self, packed: PackedAdapter, known: KnownRows, pause: Pause
    ) -> list[Callable[[], Tensor]]:
        """Return the gate's forwards, of base and adapter, for the thread that runs the base; none
        without a record. Other work may come between them, and in them where they call `pause`.
        """
        if self.record is None:
            return []
        return forwards(self.record, self._logits(packed, known, pause))

    def check_parity(self, logits: Sequence[Tensor]) -> Parity | None:
        """Judge what both `parity_forwards` gave, in their order; None without a record.

        Raises ParityFailed.
        """
        if self.record is None:
            return None
        spec, tensors_sha256 = self.base.spec, self.form.facts.tensors_sha256
        parity = compare(self.record, logits, spec.dtype)
        require(parity, self.record, tensors_sha256, exceeds_bfloat16=spec.exceeds_bfloat16)
        return parity

    def gate(self, packed: PackedAdapter) -> Parity | None:
        """Run and judge the whole gate on this thread, which must be the one that runs the base."""
        spec, tensors_sha256 = self.base.spec, self.form.facts.tensors_sha256
        exceeds, logits = spec.exceeds_bfloat16, self._logits(packed)
        return gate(self.record, logits, spec.dtype, tensors_sha256, exceeds_bfloat16=exceeds)

    def _logits(
        self, packed: PackedAdapter, known: KnownRows | None = None, pause: Pause = no_pause
    ) -> Logits:
        """What the gate compares: of the base with its values as the record's held them."""
        was_rounded = self.record is not None and self.record.base_dtype == "bfloat16"
        must_round = was_rounded and self.base.spec.exceeds_bfloat16
        base = as_bfloat16_holds(self.base) if must_round else self.base
        return adapter_logits(base, packed, known, pause)

    def loaded(self, packed: PackedAdapter) -> LoadedAdapter:
        """Return what is told of it once it is kept."""
        return LoadedAdapter(
            facts=self.form.facts,
            ranks=self.form.ranks,
            target_modules=self.form.target_modules,
            num_parameters=self.form.num_parameters,
            nbytes=packed.nbytes,
            text_files=self.form.text_files,
        )
