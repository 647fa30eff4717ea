"""Converts a GGUF file to a bfloat16 transformers checkpoint with its tokenizer.

transformers reads the weights. What its readers leave out of the tokenizer differs by version, so
the tokenizer is corrected here from the file's own metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

from lora_runtime.errors import BaseRefused

SPECIAL_TOKENS = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
}
"""<name> of `tokenizer.ggml.<name>_token_id` in the file → the tokenizer's attribute."""


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model in `file`, dequantised to bfloat16, and its tokenizer into `folder`.

    Raises BaseRefused when the file is damaged or its architecture is unknown to transformers.
    """
    disable_progress_bar()  # its bars are for notebooks; progress is told in steps here
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            **source,
            local_files_only=True,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        _correct(tokenizer, GGUFReader(file))
    except Exception as error:  # a damaged file fails anywhere inside the readers
        raise BaseRefused(f"cannot read {file.name} as a GGUF language model: {error}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _correct(tokenizer: Any, reader: GGUFReader) -> None:
    """Set the special tokens, the decoder and the splitting of digits as the file has them."""
    for name, attribute in SPECIAL_TOKENS.items():
        if (field := reader.get_field(f"tokenizer.ggml.{name}_token_id")) is not None:
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(field.contents())))
    if _text(reader, "tokenizer.ggml.model") == "gpt2":
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    if _text(reader, "tokenizer.ggml.pre") == "smollm":
        # Digits are split before words: LLAMA_VOCAB_PRE_TYPE_SMOLLM in llama.cpp's llama-vocab.cpp.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )


def _text(reader: GGUFReader, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None else field.contents()
