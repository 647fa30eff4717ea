"""The files of an adapter's folder that change what it does here, and how large each may be.

Free of tensors, so that a client can import it.
Source: peft 0.21.2, `save_pretrained`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from lora_runtime.text.text_files import TEXT_FILES

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PARITY_FILE = "loramux_parity.json"

MAX_CONFIG_BYTES = 1 << 20
MAX_TENSORS_BYTES = 2 << 30
MAX_PARITY_BYTES = 1 << 18

REQUIRED_FILES = (CONFIG_FILE, TENSORS_FILE)
OPTIONAL_FILES = (PARITY_FILE, *TEXT_FILES)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""How files end that PyTorch writes as pickles, which can run code and are never read."""
INITIAL_FOLDERS = ("pissa_init", "olora_init")
"""Sub-folders with the adapter as it was before training, where its init changed the base."""

FINGERPRINT_KEY = "loramux.base_fingerprint"
QUANTIZATION_KEY = "loramux.base_quantization"
VERSION_KEY = "loramux.version"
"""Keys of our own in `__metadata__` of the safetensors file."""


def content_digest(hashes: Mapping[str, str]) -> str:
    """SHA-256 in hexadecimal over the names and SHA-256s of all files of a folder."""
    content = json.dumps(sorted(hashes.items()), separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()
