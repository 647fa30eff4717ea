"""The bytes of single tokens, as log probabilities show them: a token may be half a character."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import tokenizers

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
"""What stands for a space in vocabularies without byte-level text."""


class TokenReader:
    """Token id → the bytes that the token adds to a text; special tokens as they are written.

    Byte-level vocabularies write each byte as one printable character; the others write a space as
    U+2581 and a byte without a character as `<0x0A>`. Joined over a text they are its UTF-8, but
    for the space that some tokenizers put before a text. Source: tokenizers, its decoders
    ByteLevel, ByteFallback, Replace and Metaspace.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, added: Iterable[tuple[int, str, bool]] | None = None
    ) -> None:
        """`added`: (id, text, whether special) of the added tokens; None: the backend's own."""
        own = backend.get_added_tokens_decoder()
        texts = {i: token.content for i, token in own.items()}
        if added is not None:
            texts = {i: text for i, text, _ in added}
        self._added = {i: text.encode() for i, text in texts.items()}
        self._text_of = backend.id_to_token
        decoder = backend.decoder
        state = "" if decoder is None else json.dumps(json.loads(decoder.__getstate__()))
        self._is_byte_level = '"ByteLevel"' in state

    def __call__(self, token_id: int) -> bytes:
        """Return a token's bytes; of an id that no token has, none."""
        if token_id in self._added:
            return self._added[token_id]
        written = self._text_of(token_id)
        if written is None:
            return b""
        if self._is_byte_level:
            return bytes(_BYTES[character] for character in written if character in _BYTES)
        if byte := _BYTE.fullmatch(written):
            return bytes.fromhex(byte[1])
        return written.replace(_SPACE, " ").encode()


def vocabulary_bytes(
    backend: tokenizers.Tokenizer, vocab_size: int
) -> tuple[list[bytes], list[int]] | None:
    """Return the bytes of each id below `vocab_size`, and the ids of special tokens.

    None for a vocabulary whose tokens are no bytes of their own: one that is decoded neither by
    bytes nor with a sign for the space, or lacks a token for a printable ASCII character.
    """
    state = "" if backend.decoder is None else json.loads(backend.to_str())["decoder"]
    written = json.dumps(state, ensure_ascii=False)
    if not any(sign in written for sign in ('"ByteLevel"', '"Metaspace"', _SPACE)):
        return None
    bytes_of = TokenReader(backend)
    tokens = [bytes_of(index) for index in range(vocab_size)]
    if not {bytes([byte]) for byte in (10, *range(32, 127))} <= set(tokens):
        return None
    added = backend.get_added_tokens_decoder()
    return tokens, [i for i, token in added.items() if token.special and i < vocab_size]


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte: itself where it is printable, else the next of those
    from U+0100 on. Source: GPT-2's `bytes_to_unicode`, which every byte-level vocabulary follows.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(0x100 + index): byte for index, byte in enumerate(hidden)
    }


_BYTES = _byte_characters()
