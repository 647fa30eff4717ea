"""An adapter's own text side: how its text becomes tokens, how chats are rendered, what ends it.

`read_text_side` lays the adapter's files over the base's, lets transformers load both, and gives
what differs; what cannot be honoured beside the base's own tokens is refused by name. The files
are foreign: this runs in a process of its own (`worker.py`), whose time and memory are limited.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_runtime.errors import AdapterRefused, written
from lora_runtime.strict_json import parse_object
from lora_runtime.text.template_check import check_template
from lora_runtime.text.text_files import (
    ADDED_FILE,
    GENERATION_FILE,
    SETTINGS_FILE,
    SPECIAL_FILE,
    TEMPLATE_FILE,
    TEXT_FILES,
    TOKENIZER_FILE,
    VOCABULARY_FILES,
)
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.tokenizer import configured_eos_ids

BESIDE_TOKENIZER = {TEMPLATE_FILE, GENERATION_FILE}
"""Files that leave the tokenizer as it is."""
BASE_CONFIG_FILE = "config.json"
MAX_EXTRA_CHARACTERS = 4 << 20
"""Characters by which an adapter's tokenizer, as JSON, may be longer than the base's."""
TRIAL_TEXTS = ("", "Hello, world!", " two  spaces\n\ttab é 狐狸 🦊 </s> <|x|> 12345 don't")
"""Texts on which the tokenizer that will serve must agree with the one that transformers loads."""
STEERING = (
    "bad_words_ids", "begin_suppress_tokens", "constraints", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id",
    "forced_eos_token_id", "min_length", "min_new_tokens", "no_repeat_ngram_size",
    "sequence_bias", "stop_strings", "suppress_tokens", "watermarking_config",
)  # fmt: skip
"""Settings of a generation_config.json that would change every output, and are not served."""
CHOICES = (
    "do_sample", "epsilon_cutoff", "eta_cutoff", "max_length", "max_new_tokens", "min_p",
    "num_beams", "repetition_penalty", "temperature", "top_k", "top_p", "typical_p",
)  # fmt: skip
"""Settings that a request makes for itself."""


def read_text_side(
    files: Mapping[str, bytes], base_folder: Path, vocab_size: int, work: Path
) -> tuple[TextSide | None, tuple[str, ...]]:
    """Return an adapter's text side, None where it is the base's, and notes on it.

    `files`: those of TEXT_FILES that its folder holds; `vocab_size`: rows of the base's embedding;
    `work`: an empty folder to write to. Raises AdapterRefused naming the file.
    """
    parsed = {
        name: parse_object(files[name], name, is_finite=False)
        for name in files
        if name.endswith(".json")
    }
    named = list(_named_tokens(parsed))
    _check_utf8(files)
    base = _load_base(base_folder)
    own, tokenizer, added = base, None, None
    if files.keys() - BESIDE_TOKENIZER:
        _lay_over(files, parsed, base_folder, work)
        field = TOKENIZER_FILE if TOKENIZER_FILE in files else SETTINGS_FILE
        own = _load(work, field)
        _check_ids(named, parsed, own, vocab_size)
        tokenizer, added = _tokenizer(own, base, vocab_size)
    template, is_own = _template(files, parsed, own, base)
    variables = _variables(own)
    notes = [*_notes(own, files, is_own, vocab_size), *_generation_notes(parsed)]
    side = TextSide(
        template=template,
        variables=variables,
        is_own_template=(template, variables) != (_default(base.chat_template), _variables(base)),
        tokenizer=tokenizer,
        added=added,
        eos_token_ids=_eos_ids(own, parsed.get(GENERATION_FILE), base_folder, vocab_size),
    )
    ends = configured_eos_ids(base_folder) | {base.eos_token_id} - {None}
    is_base = not side.is_own_template and tokenizer is None and added is None
    if is_base and set(side.eos_token_ids) == ends:
        return None, tuple(notes)
    content = json.dumps(side.to_json(), sort_keys=True).encode()
    return replace(side, key=hashlib.sha256(content).hexdigest()), tuple(notes)


def _refused(why: str, field: str) -> AdapterRefused:
    return AdapterRefused(why, field=field)


def _check_utf8(files: Mapping[str, bytes]) -> None:
    try:
        files.get(TEMPLATE_FILE, b"").decode()
    except UnicodeDecodeError as error:
        raise _refused(f"{TEMPLATE_FILE} is not UTF-8: {error}", TEMPLATE_FILE) from None


@lru_cache(maxsize=1)
def _load_base(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )


def _load(folder: Path, field: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except MemoryError:
        raise
    except BaseException as error:  # foreign files; a panic of Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise _refused(f"its tokenizer cannot be loaded: {str(error)[:300]}", field) from None


def _lay_over(
    files: Mapping[str, bytes], parsed: Mapping[str, dict[str, Any]], base: Path, work: Path
) -> None:
    """Write the base's text files, and the adapter's in the place of those of the same meaning."""
    dropped = set(files)
    if TEMPLATE_FILE in files or "chat_template" in parsed.get(SETTINGS_FILE, ()):
        dropped.add(TEMPLATE_FILE)
    if SETTINGS_FILE in files or TOKENIZER_FILE in files:
        dropped |= {SPECIAL_FILE, ADDED_FILE}
    for name in (BASE_CONFIG_FILE, *TEXT_FILES):
        if name not in dropped and (base / name).is_file():
            shutil.copyfile(base / name, work / name)
    for name, content in files.items():
        if name in VOCABULARY_FILES:
            _check_vocabulary_file(name, content, files, base)
            if (base / name).is_file():
                shutil.copyfile(base / name, work / name)
        elif name == SETTINGS_FILE:
            (work / name).write_text(json.dumps(_without_paths(parsed[name])))
        else:
            (work / name).write_bytes(content)


def _check_vocabulary_file(
    name: str, content: bytes, files: Mapping[str, bytes], base: Path
) -> None:
    if TOKENIZER_FILE in files:
        return  # transformers reads that one
    if not (base / name).is_file() or (base / name).read_bytes() != content:
        raise _refused(
            f"{name} is not the base's, and no tokenizer.json is beside it: save the adapter's "
            "tokenizer with transformers' save_pretrained, or remove the file to use the base's",
            name,
        )


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Drop what would lead transformers to files or code elsewhere."""
    return {
        name: value
        for name, value in settings.items()
        if name != "auto_map" and not name.endswith("_file")
    }


def _check_ids(
    named: Iterable[tuple[str, str, int]],
    parsed: Mapping[str, dict[str, Any]],
    own: PreTrainedTokenizerBase,
    vocab_size: int,
) -> None:
    """Every token that a file names has the id that it names, in the tokenizer that results."""
    vocabulary = own.get_vocab()
    for name, token, index in named:
        if vocabulary.get(token) != index and index < vocab_size:
            raise _refused(
                f"{name} has the token {token[:40]!r} with id {index}, which this base's tokenizer "
                f"does not have; with its other files it becomes {vocabulary.get(token)}",
                name,
            )
        if index >= vocab_size and token != own.pad_token:
            raise _beyond(token, index, vocab_size, name)
    if SPECIAL_FILE in parsed and SETTINGS_FILE not in parsed:
        for role, value in parsed[SPECIAL_FILE].items():
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str) and str(getattr(own, role, None)) != content:
                raise _refused(
                    f"{SPECIAL_FILE} says that {role} is {content[:40]!r}, which "
                    f"{SETTINGS_FILE} must say to be honoured; add that file",
                    SPECIAL_FILE,
                )


def _beyond(token: str, index: int, vocab_size: int, field: str) -> AdapterRefused:
    return _refused(
        f"{field} has the token {token[:40]!r} with id {index}, which this base's tokenizer does "
        f"not have: its embedding has {vocab_size} rows. Adapters that lengthen it are not served",
        field,
    )


def _named_tokens(parsed: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str, int]]:
    """Yield (file, token, id) of added tokens."""
    for token, index in parsed.get(ADDED_FILE, {}).items():
        if type(index) is not int:
            raise _refused(f"{ADDED_FILE}: the id of {token[:40]!r} is no integer", ADDED_FILE)
        yield ADDED_FILE, token, index
    decoder = parsed.get(SETTINGS_FILE, {}).get("added_tokens_decoder")
    for index, entry in decoder.items() if isinstance(decoder, dict) else ():
        content = entry.get("content") if isinstance(entry, dict) else None
        if (
            not isinstance(content, str)
            or not (index.isascii() and index.isdecimal())
            or len(index) > 9
        ):
            raise _refused(f"{SETTINGS_FILE}: added_tokens_decoder is malformed", SETTINGS_FILE)
        yield SETTINGS_FILE, content, int(index)
    for entry in parsed.get(TOKENIZER_FILE, {}).get("added_tokens") or ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            if type(entry.get("id")) is int:
                yield TOKENIZER_FILE, entry["content"], entry["id"]


def _tokenizer(
    own: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[str | None, tuple[tuple[int, str, bool], ...] | None]:
    """The tokenizer that encodes and the added tokens that decode, each where it is not the base's.

    Vocabulary, merges and decoder must be the base's: its rows have no other meaning.
    """
    theirs, ours = _backend(own), _backend(base)
    added, base_added = _added(theirs), _added(ours)
    _check_model(theirs, ours, added, base_added)
    if theirs["decoder"] != ours["decoder"]:
        raise _refused(f"the decoder of its {TOKENIZER_FILE} is not the base's", TOKENIZER_FILE)
    if bool(own.split_special_tokens) != bool(base.split_special_tokens):
        raise _refused("split_special_tokens is not the base's value", SETTINGS_FILE)
    for index, token, _ in added:
        if index >= vocab_size and token != own.pad_token:
            raise _beyond(token, index, vocab_size, TOKENIZER_FILE)
    parts = ("normalizer", "pre_tokenizer", "post_processor", "added_tokens", "model")
    if all(theirs[part] == ours[part] for part in parts):
        return None, None
    text = json.dumps(theirs, ensure_ascii=False)
    if len(text) > len(json.dumps(ours, ensure_ascii=False)) + MAX_EXTRA_CHARACTERS:
        raise _refused(
            f"{TOKENIZER_FILE} has over {MAX_EXTRA_CHARACTERS} characters more than the base's",
            TOKENIZER_FILE,
        )
    _check_agreement(Backend.from_str(text), own)
    shown = _as_decoded(added, own)
    return text, None if shown == _as_decoded(base_added, base) else shown


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(
            f"{type(tokenizer).__name__} is not made of {TOKENIZER_FILE}; only the base's own "
            "tokenizer may be",
            SETTINGS_FILE,
        )
    return {**json.loads(backend.to_str()), "truncation": None, "padding": None}


def _added(backend: Mapping[str, Any]) -> tuple[tuple[int, str, bool], ...]:
    tokens = backend["added_tokens"]
    return tuple(sorted((t["id"], t["content"], bool(t["special"])) for t in tokens))


def _as_decoded(
    added: tuple[tuple[int, str, bool], ...], tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, str, bool], ...]:
    """Added tokens as a decoder gets them: those that are normalised have been."""
    backend = tokenizer.backend_tokenizer
    return tuple((index, backend.id_to_token(index), special) for index, _, special in added)


def _check_model(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    added: tuple[tuple[int, str, bool], ...],
    base_added: tuple[tuple[int, str, bool], ...],
) -> None:
    """The model under the added tokens is the base's."""
    apart = {(token, index) for index, token, _ in (*added, *base_added)}
    own_ids, base_ids = _vocabulary(theirs["model"]), _vocabulary(ours["model"])
    for token, index in sorted(own_ids ^ base_ids, key=lambda pair: pair[1]):
        if (token, index) not in apart:
            raise _refused(
                f"{TOKENIZER_FILE} differs from the base's in the token {token[:40]!r} with id "
                f"{index}, which this base's tokenizer does not have or has and it has not",
                TOKENIZER_FILE,
            )
    plain = base_ids - {(token, index) for index, token, _ in base_added}
    taken = {index: token for token, index in plain}
    for index, token, _ in added:
        if taken.get(index, token) != token:
            raise _refused(
                f"{TOKENIZER_FILE} gives the token {token[:40]!r} the id {index}, which is "
                f"{taken[index][:40]!r} in this base's tokenizer",
                TOKENIZER_FILE,
            )
    for key in (theirs["model"].keys() | ours["model"].keys()) - {"vocab"}:
        if theirs["model"].get(key) != ours["model"].get(key):
            raise _refused(f"model.{key} of its {TOKENIZER_FILE} is not the base's", TOKENIZER_FILE)


def _vocabulary(model: Mapping[str, Any]) -> set[tuple[str, int]]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return set(vocabulary.items())
    return {(str(entry), index) for index, entry in enumerate(vocabulary)}


def _check_agreement(backend: Backend, own: PreTrainedTokenizerBase) -> None:
    for text in TRIAL_TEXTS:
        for special in (True, False):
            ids = own.encode(text, add_special_tokens=special, verbose=False)
            if backend.encode(text, add_special_tokens=special).ids != ids:
                raise _refused(
                    f"{type(own).__name__} encodes otherwise than its {TOKENIZER_FILE}; save the "
                    "tokenizer as PreTrainedTokenizerFast",
                    SETTINGS_FILE,
                )


def _template(
    files: Mapping[str, bytes],
    parsed: Mapping[str, dict[str, Any]],
    own: PreTrainedTokenizerBase,
    base: PreTrainedTokenizerBase,
) -> tuple[str | None, bool]:
    """The chat template, and whether the adapter brings it."""
    field = TEMPLATE_FILE if TEMPLATE_FILE in files else SETTINGS_FILE
    if field == SETTINGS_FILE and not parsed.get(field, {}).get("chat_template"):
        return _default(base.chat_template), False
    is_file = field == TEMPLATE_FILE
    template = files[field].decode() if is_file else _default(own.chat_template)
    if not isinstance(template, str):
        raise _refused(f"{field} has no chat template named 'default'", field)
    check_template(template, field)
    return template, True


def _default(template: object) -> Any:
    return template.get("default") if isinstance(template, dict) else template


def _variables(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | list[str]]:
    special: Mapping[str, Any] = tokenizer.special_tokens_map
    return {
        name: [str(token) for token in value] if isinstance(value, list | tuple) else str(value)
        for name, value in special.items()
    }


def _eos_ids(
    own: PreTrainedTokenizerBase,
    generation: Mapping[str, Any] | None,
    base_folder: Path,
    vocab_size: int,
) -> tuple[int, ...]:
    """The tokenizer's end token, and those of the adapter's generation config, else the base's."""
    named = (generation or {}).get("eos_token_id")
    wanted = named if isinstance(named, list) else [] if named is None else [named]
    for index in wanted:
        if type(index) is not int or not 0 <= index < vocab_size:
            raise _refused(
                f"{GENERATION_FILE}: eos_token_id has {written(index)}; it must be a whole number, "
                f"the id of one of the base's {vocab_size} tokens",
                GENERATION_FILE,
            )
    ends = set(wanted) if named is not None else set(configured_eos_ids(base_folder))
    if own.eos_token_id is not None:
        if own.eos_token_id >= vocab_size:
            raise _beyond(str(own.eos_token), own.eos_token_id, vocab_size, SETTINGS_FILE)
        ends.add(own.eos_token_id)
    return tuple(sorted(ends))


def _notes(
    own: PreTrainedTokenizerBase, files: Mapping[str, bytes], is_own: bool, vocab_size: int
) -> Iterator[str]:
    if own.pad_token_id is not None and own.pad_token_id >= vocab_size:
        yield (
            f"its pad token {str(own.pad_token)[:40]!r} has no row in the base: nothing is padded "
            "here, and a prompt that contains it is refused"
        )
    if TOKENIZER_FILE in files and not is_own and own.chat_template is None:
        yield "it brings a tokenizer without a chat template: the base's renders its chats"


def _generation_notes(parsed: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    settings = parsed.get(GENERATION_FILE, {})
    for name in STEERING:
        if settings.get(name) not in (None, False, 0, [], {}, ""):
            raise _refused(
                f"{GENERATION_FILE} sets {name}, which is not served; remove it, or send it with "
                "each request where a field exists",
                GENERATION_FILE,
            )
    given = [name for name in CHOICES if settings.get(name) is not None]
    if given:
        yield f"{', '.join(given)} of its {GENERATION_FILE} are not used: requests say their own"
