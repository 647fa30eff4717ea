"""Files beside an adapter that change what text means to it, where they are not the base's own.

What they mean is read by `lora_runtime.text`, in a process of its own; here bytes are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from lora_runtime.adapters.files.file_names import content_digest


def own_text_files(text: Mapping[str, bytes], base_folder: Path) -> Mapping[str, bytes]:
    """Return an adapter's text files, or none of them where every one is the base's, byte for byte.

    The files say one thing together, so that one that differs makes all of them the adapter's.
    """
    return {} if all(_is_bases(base_folder / name, text[name]) for name in text) else dict(text)


def text_digest(text: Mapping[str, bytes]) -> str:
    """SHA-256 over text files, "" for none."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in text.items()}
    return content_digest(hashes) if hashes else ""


def _is_bases(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content
