"""A GGUF file written by the `gguf` library becomes a checkpoint with the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_runtime.base.gguf import convert_gguf
from lora_runtime.errors import BaseRefused

HIDDEN, HEADS, INNER = 64, 2, 96
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
REST = [byte for byte in range(256) if byte not in BYTES]
ALPHABET = [chr(b) for b in BYTES] + [chr(256 + i) for i in range(len(REST))]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ALPHABET, "12", "ĠĠ"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_gguf(path: Path, pre: str) -> dict[str, np.ndarray]:
    """A one-layer Llama of random weights; its vocabulary could merge `12` and two blanks."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["1 2", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    tensors = random_tensors()
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def random_tensors() -> dict[str, np.ndarray]:
    square, wide, tall = (HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.{name}_norm": (HIDDEN,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": square for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": wide, "blk.0.ffn_up": wide, "blk.0.ffn_down": tall}
    random = np.random.default_rng(0)
    return {
        f"{name}.weight": random.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    work = tmp_path_factory.mktemp("gguf")
    tensors = write_gguf(work / "tiny.gguf", "smollm")
    convert_gguf(work / "tiny.gguf", work / "out")
    return work / "out", tensors


def test_weights_are_the_files_rounded_to_bfloat16(
    converted: tuple[Path, dict[str, np.ndarray]],
) -> None:
    folder, tensors = converted
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    layer = model.model.layers[0]
    pairs = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "blk.0.attn_v.weight": layer.self_attn.v_proj.weight,
        "blk.0.attn_output.weight": layer.self_attn.o_proj.weight,
        "blk.0.ffn_down.weight": layer.mlp.down_proj.weight,
        "blk.0.ffn_norm.weight": layer.post_attention_layernorm.weight,
    }
    for name, weight in pairs.items():
        assert torch.equal(weight, torch.from_numpy(tensors[name]).bfloat16()), name


def test_tokenizer_and_template_come_along(
    converted: tuple[Path, dict[str, np.ndarray]],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.chat_template == TEMPLATE
    # llama.cpp's `smollm` splits off every digit before it looks for words and blanks.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("▁ é 12")) == "▁ é 12"


def test_other_vocabularies_keep_their_split(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "gpt-2")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("12") == ["12"]


def test_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF or not")
    with pytest.raises(BaseRefused, match=r"cannot read broken\.gguf"):
        convert_gguf(tmp_path / "broken.gguf", tmp_path / "out")
