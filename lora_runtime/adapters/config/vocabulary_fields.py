"""What a config asks of the embedding and the output layer. Plain Python.

Source: peft 0.21.2, `set_additional_trainable_modules`, `_check_tied_modules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_runtime.adapters.config.matching import tails
from lora_runtime.adapters.config.values import Config, flag, names, token_ids, wrong_value
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularySpec:
    """Which rows of the vocabulary are replaced; keys and entries are base paths."""

    replaced: tuple[str, ...] = ()
    """Modules whose weight is replaced as a whole."""
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Module → the token ids whose rows are replaced, in the order of the file."""
    tied_to: Mapping[str, str] = field(default_factory=dict)
    """Module → the one whose replaced rows it shares."""


def parse_vocabulary(
    config: Config, base: BaseSpec, trained_names: Mapping[str, str]
) -> VocabularySpec:
    """Read modules_to_save and trainable_token_indices. Raises AdapterRefused."""
    ends = {path: trained_names[path] for path in (base.embedding, base.head)}
    ensures_tying = flag(config, "ensure_weight_tying") and base.is_tied
    replaced = _replaced(config, ends)
    tokens = _tokens(config, base, ends)
    if replaced and tokens and (base.is_tied or set(replaced) & set(tokens)):
        raise AdapterRefused(
            "trainable_token_indices and modules_to_save change the same rows; use one of them",
            field="trainable_token_indices",
        )
    if replaced and ensures_tying:
        replaced = (base.embedding,)
        return VocabularySpec(replaced=replaced, tied_to={base.head: base.embedding})
    if base.is_tied and _tokens_are_tied(tokens, base, ensures_tying):
        own = {base.embedding: tokens[base.embedding]}
        return VocabularySpec(tokens=own, tied_to={base.head: base.embedding})
    return VocabularySpec(replaced=replaced, tokens=tokens)


def _replaced(config: Config, ends: Mapping[str, str]) -> tuple[str, ...]:
    entries = names(config, "modules_to_save")
    entries = (entries,) if isinstance(entries, str) else entries
    found = {_end(entry, ends, "modules_to_save") for entry in entries}
    return tuple(path for path in ends if path in found)


def _end(entry: str, ends: Mapping[str, str], field: str) -> str:
    path = next((path for path, name in ends.items() if entry in tails(name)), None)
    if path is None:
        raise AdapterRefused(
            f"{field} names {entry[:80]!r}; only the embedding and the output layer "
            f"({', '.join(ends.values())}) can be replaced",
            field=field,
        )
    return path


def _tokens(config: Config, base: BaseSpec, ends: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    field = "trainable_token_indices"
    value = config.get(field) or {}
    by_entry = value if isinstance(value, dict) else {ends[base.embedding]: value}
    tokens: dict[str, tuple[int, ...]] = {}
    for entry, listed in by_entry.items():
        ids = token_ids(listed, field, base.vocab_size)
        path = _end(entry, ends, field)
        if not ids or len(set(ids)) != len(ids) or path in tokens:
            raise wrong_value(field, value, "each module and each of its tokens once")
        tokens[path] = ids
    return tokens


def _tokens_are_tied(
    tokens: Mapping[str, tuple[int, ...]], base: BaseSpec, ensures_tying: bool
) -> bool:
    """True when the output layer of a tied base takes the embedding's trained rows."""
    if base.embedding not in tokens:
        return False
    agree = tokens.get(base.head, tokens[base.embedding]) == tokens[base.embedding]
    if ensures_tying and not agree:
        raise AdapterRefused(
            "trainable_token_indices lists other tokens for the embedding than for the output "
            "layer, which ensure_weight_tying forbids",
            field="trainable_token_indices",
        )
    return agree
