"""Files beside an adapter that change what text means to it: chat template and tokens.

Read without trust, like the adapter's own. Source: transformers, `PreTrainedTokenizerBase`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_runtime.adapters.files.file_names import (
    ADDED_FILE,
    SETTINGS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
)
from lora_runtime.adapters.files.strict_json import parse_object
from lora_runtime.errors import AdapterRefused

TOKEN_FILES = (ADDED_FILE, SETTINGS_FILE, TOKENIZER_FILE)


def own_chat_template(
    theirs: Mapping[str, bytes], base_folder: Path, vocab_size: int
) -> str | None:
    """The adapter's chat template where it differs from the base's, else None.

    Raises: AdapterRefused for tokens that the base's tokenizer does not have.
    """
    if not theirs:
        return None
    files = ((name, base_folder / name) for name in (TEMPLATE_FILE, *TOKEN_FILES))
    ours = {name: path.read_bytes() for name, path in files if path.is_file()}
    _check_tokens(theirs, ours, vocab_size)
    template = _template(theirs)
    return template if template != _template(ours) else None


def _template(files: Mapping[str, bytes]) -> str | None:
    if TEMPLATE_FILE in files:
        try:
            return files[TEMPLATE_FILE].decode()
        except UnicodeDecodeError as error:
            raise AdapterRefused(
                f"{TEMPLATE_FILE} is not UTF-8: {error}", field=TEMPLATE_FILE
            ) from None
    value = parse_object(files[SETTINGS_FILE], SETTINGS_FILE) if SETTINGS_FILE in files else {}
    template = value.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        default = (entry for entry in named if entry.get("name") == "default")
        template = next((entry.get("template") for entry in default), None)
    return template if isinstance(template, str) else None


def _check_tokens(theirs: Mapping[str, bytes], ours: Mapping[str, bytes], vocab_size: int) -> None:
    """Every token of the adapter's files must be one of the base's, with the same id."""
    changed = [name for name in TOKEN_FILES if theirs.get(name) not in (None, ours.get(name))]
    if not changed:
        return
    known = {pair for name, content in ours.items() for pair in _tokens(name, content)}
    for name in changed:
        for token, index in _tokens(name, theirs[name]):
            if (known and (token, index) not in known) or index >= vocab_size:
                raise AdapterRefused(
                    f"{name} has the token {token[:40]!r} with id {index}, which this base's "
                    "tokenizer does not have; adapters with their own tokens are not served",
                    field=name,
                )


def _tokens(name: str, content: bytes) -> Iterator[tuple[str, int]]:
    """Yield (token, id) of one tokenizer file."""
    if name == TEMPLATE_FILE:
        return
    value = parse_object(content, name)
    if name == ADDED_FILE:
        yield from _pairs(value)
    elif name == SETTINGS_FILE:
        yield from _decoder_pairs(value.get("added_tokens_decoder"))
    else:
        yield from _added_pairs(value.get("added_tokens"))
        model = value.get("model")
        yield from _pairs(model.get("vocab") if isinstance(model, dict) else None)


def _pairs(value: object) -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        yield from ((token, index) for token, index in value.items() if type(index) is int)
    elif isinstance(value, list):  # Unigram: [token, score], in the order of ids
        entries = enumerate(value)
        yield from ((e[0], i) for i, e in entries if isinstance(e, list) and isinstance(e[0], str))


def _decoder_pairs(value: object) -> Iterator[tuple[str, int]]:
    for index, entry in value.items() if isinstance(value, dict) else ():
        if isinstance(entry, dict) and index.isdecimal() and isinstance(entry.get("content"), str):
            yield entry["content"], int(index)


def _added_pairs(value: object) -> Iterator[tuple[str, int]]:
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            index = entry.get("id")
            yield from [(entry["content"], index)] if type(index) is int else []
