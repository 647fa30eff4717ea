"""The files of an adapter's folder that change what it does here, and how large each may be.

Free of tensors, so that a client can import it.
Source: peft 0.21.2, `save_pretrained`; transformers 5, `PreTrainedTokenizerBase.save_pretrained`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
SIDECAR_FILE = "loramux_parity.json"
TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
ADDED_FILE = "added_tokens.json"
SPECIAL_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
VOCABULARY_FILES = ("tokenizer.model", "vocab.json", "merges.txt")
"""What tokenizers were made of before tokenizer.json, and what some are made of still."""

MAX_CONFIG_BYTES = 1 << 20
MAX_TENSORS_BYTES = 2 << 30
MAX_SIDECAR_BYTES = 1 << 18
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 64 << 20

TEXT_FILES: Mapping[str, int] = {
    TEMPLATE_FILE: MAX_TEMPLATE_BYTES,
    SETTINGS_FILE: MAX_TOKENIZER_BYTES,
    TOKENIZER_FILE: MAX_TOKENIZER_BYTES,
    ADDED_FILE: MAX_TOKENIZER_BYTES,
    SPECIAL_FILE: MAX_CONFIG_BYTES,
    GENERATION_FILE: MAX_CONFIG_BYTES,
    **dict.fromkeys(VOCABULARY_FILES, MAX_TOKENIZER_BYTES),
}
"""What says how text becomes tokens and where an output ends → its largest size in bytes."""
REQUIRED_FILES = (CONFIG_FILE, TENSORS_FILE)
OPTIONAL_FILES = (SIDECAR_FILE, *TEXT_FILES)
INITIAL_FOLDERS = ("pissa_init", "olora_init")
"""Sub-folders with the adapter as it was before training, where its init changed the base."""


def content_digest(hashes: Mapping[str, str]) -> str:
    """SHA-256 in hexadecimal over the names and SHA-256s of all files of a folder."""
    content = json.dumps(sorted(hashes.items()), separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()
