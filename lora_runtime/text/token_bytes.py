"""The bytes that each token of a vocabulary stands for, whole characters or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What stands for a space in vocabularies made by SentencePiece."""


def token_bytes(backend: Backend, vocab_size: int) -> tuple[list[bytes], list[int]] | None:
    """Return each id's bytes, empty for ids without a token, and the ids of special tokens.

    None for a vocabulary whose tokens are no bytes of their own: one that is decoded neither by
    bytes nor with a sign for the space, or lacks a token for a printable ASCII character. Sources:
    tokenizers' decoders ByteLevel, ByteFallback and Metaspace.
    """
    as_bytes = _reader(json.loads(backend.to_str())["decoder"])
    if as_bytes is None:
        return None
    added = backend.get_added_tokens_decoder()
    tokens = [b""] * vocab_size
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index < vocab_size:
            tokens[index] = token.encode() if index in added else as_bytes(token)
    special = [index for index, token in added.items() if token.special and index < vocab_size]
    is_whole = {bytes([byte]) for byte in (10, *range(32, 127))} <= set(tokens)
    return (tokens, special) if is_whole else None


def _reader(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes] | None:
    parts = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        return _of_byte_level
    signs = [part.get("pattern", {}).get("String") for part in parts if part["type"] == "Replace"]
    if "Metaspace" in kinds or SPACE in signs:
        return _of_sentencepiece
    return None


def _of_byte_level(token: str) -> bytes:
    return bytes(_BYTES[character] for character in token if character in _BYTES)


def _of_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()


def _byte_characters() -> dict[str, int]:
    """Character → byte in byte-level vocabularies. Source: GPT-2's `bytes_to_unicode`."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {
        **{chr(byte): byte for byte in shown},
        **{chr(256 + index): byte for index, byte in enumerate(hidden)},
    }


_BYTES = _byte_characters()
