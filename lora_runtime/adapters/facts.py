"""What an adapter's files say of it, said once: the engine, the server and people read it here.

Free of tensors, so that a server's other processes can import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """The facts of one adapter, the same from its serving form to a server's answer about it."""

    digest: str = ""
    """SHA-256 of its honoured fields and of its tensors' files: equal digests, equal adapters."""
    variant: str
    """`lora`, `rslora`, `dora`, …: shown to people, never branched on."""
    honoured: Mapping[str, object] = field(default_factory=dict)
    """Fields of adapter_config.json that changed the result, and their values."""
    inert: Mapping[str, str] = field(default_factory=dict)
    """Fields present that do not matter at serving, each with its reason."""
    layer_map: tuple[int, ...] | None = None
    """Base layers in the order in which this adapter's rows visit them; None: each once."""
    invocation_tokens: tuple[int, ...] = ()
    """aLoRA: it acts from their last occurrence in the prompt; empty: everywhere."""
    notes: tuple[str, ...] = ()
    """What people should know, for example the error bound of a recovered initialisation."""
    tensors_sha256: str = ""
    """SHA-256 of the safetensors file alone, which a parity record may name."""
    text_sha256: str = ""
    """SHA-256 of its own text files; "" where its text is the base's."""

    @property
    def num_layers(self) -> int:
        """Layers of its own layer map; 0: the base's."""
        return len(self.layer_map or ())
