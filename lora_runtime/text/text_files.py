"""The files that decide how text becomes tokens and where an output ends, and their largest sizes.

Source: transformers 5, `PreTrainedTokenizerBase.save_pretrained`.
"""

from __future__ import annotations

from collections.abc import Mapping

TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
ADDED_FILE = "added_tokens.json"
SPECIAL_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
VOCABULARY_FILES = ("tokenizer.model", "vocab.json", "merges.txt")
"""Files that hold a tokenizer where there is no tokenizer.json: older models, and some new ones."""

_SMALL = 1 << 20
_LARGE = 64 << 20
TEXT_FILES: Mapping[str, int] = {
    TEMPLATE_FILE: _SMALL,
    SETTINGS_FILE: _LARGE,
    TOKENIZER_FILE: _LARGE,
    ADDED_FILE: _LARGE,
    SPECIAL_FILE: _SMALL,
    GENERATION_FILE: _SMALL,
    **dict.fromkeys(VOCABULARY_FILES, _LARGE),
}
"""File → the most bytes it may have."""
