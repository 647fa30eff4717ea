"""The model that becomes the base, against the untouched transformers model, for every shape."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_runtime.base import fingerprint as fingerprint_module
from lora_runtime.base.loader import load_base, prepare_base
from lora_runtime.base.model.rotary import fix_rotary
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.config import BaseConfig
from lora_runtime.errors import BaseRefused
from lora_runtime.kernels import cpu_library
from tests.tiny import (
    CONFIGS,
    HYBRIDS,
    VOCAB_SIZE,
    dense_twin,
    tiny_base,
    tiny_checkpoint,
    tiny_model,
)


def packed_logits(base, rows):
    lengths = [len(row) for row in rows]
    positions = torch.cat([torch.arange(n) for n in lengths])
    ends = torch.tensor(lengths).cumsum(0) - 1
    return base.forward(torch.cat(rows), positions, VarlenAttention([RowLengths(lengths)]), ends)


@pytest.mark.parametrize("shape", [*CONFIGS, *HYBRIDS])
@torch.no_grad()
def test_packed_rows_equal_the_original_model_alone(shape):
    """Short rows beside a long one, longrope too, where the original's frequencies are fixed."""
    base = tiny_base(shape)
    twin = dense_twin(base, shape)
    fix_rotary(twin, base.spec.max_model_len)
    rows = [torch.randint(VOCAB_SIZE, (n,)) for n in (3, 100, 17)]
    logits = packed_logits(base, rows)
    for row, got in zip(rows, logits, strict=True):
        torch.testing.assert_close(got, twin(row[None]).logits[0, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_long_neighbour_moves_the_original_longrope_but_not_ours():
    model = tiny_model("phi3-longrope")
    row = torch.randint(VOCAB_SIZE, (1, 10))
    before = model(row).logits
    positions = torch.cat([torch.arange(10), torch.arange(90, 100)])[None]
    both = torch.cat([row, row], 1)
    untouched = copy.deepcopy(model)(both, position_ids=positions).logits[:, :10]
    assert (untouched - before).abs().max() > 1e-2, "the trap this guards against is gone"
    base = tiny_base("phi3-longrope")
    alone = packed_logits(base, [row[0]])
    beside = packed_logits(base, [row[0], torch.randint(VOCAB_SIZE, (100,))])
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-5, atol=1e-5)


def test_fingerprint_is_the_same_in_every_dtype_and_sees_every_change():
    prints = {tiny_base("llama", dtype=d).spec.fingerprint for d in (torch.float32, torch.bfloat16)}
    assert len(prints) == 1
    others = [
        tiny_base("llama", seed=1),
        tiny_base("llama", quantization="none"),
        tiny_base("mistral"),
    ]
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        model = tiny_model("llama")
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] += 0.5
        others.append(prepare_base(model, BaseConfig(), "x", "."))
    assert len({*prints, *(base.spec.fingerprint for base in others)}) == len(others) + 1


@pytest.mark.parametrize("quantization", ["nf4-double", "int8", "none"])
def test_tables_looked_at_in_parts_have_the_same_fingerprint(quantization, monkeypatch):
    bases = [tiny_base("llama", quantization=quantization)]
    monkeypatch.setattr(fingerprint_module, "CONVERTED_AT_ONCE", 7)
    bases.append(tiny_base("llama", quantization=quantization))
    assert bases[0].spec.fingerprint == bases[1].spec.fingerprint


def test_the_last_value_of_a_table_is_looked_at(monkeypatch):
    monkeypatch.setattr(fingerprint_module, "CONVERTED_AT_ONCE", 7)
    model = tiny_model("llama").bfloat16().float()
    assert not fingerprint_module.exceeds_bfloat16(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[-1, -1] = 1 + 2**-20
    assert fingerprint_module.exceeds_bfloat16(model)


def shares_memory(tensor):
    """With other weights: all that lie in huge pages are in one run of them."""
    return tensor.untyped_storage().nbytes() > tensor.nbytes


@pytest.mark.skipif(cpu_library.library() is None, reason="panels are of the compiled library")
@pytest.mark.parametrize(
    ("name", "dtype", "is_moved"),
    [("llama", "float32", False), ("llama", "bfloat16", True), ("qwen3", "float32", False),
     ("qwen3", "bfloat16", False)],
)  # fmt: skip
def test_a_table_that_is_only_looked_up_is_not_moved_to_huge_pages(name, dtype, is_moved):
    base = tiny_base(name, dtype=getattr(torch, dtype))
    assert base.spec.is_tied is (name == "llama")
    assert shares_memory(base.model.get_input_embeddings().weight) is is_moved
    assert shares_memory(base.model.get_submodule("model.norm").weight)


def test_a_checkpoint_on_disk_gives_the_same_base(tmp_path):
    folder = tiny_checkpoint(tmp_path / "tiny", "llama")
    base = load_base(BaseConfig(model=str(folder), dtype="float32", device="cpu"))
    assert base.spec.fingerprint == tiny_base("llama").spec.fingerprint
    assert base.spec.max_model_len == 512 and base.spec.vocab_size == VOCAB_SIZE
    assert base.spec.linears["model.layers.2.mlp.down_proj"].in_features == 128
    assert not any(p.requires_grad for p in base.model.parameters())


def test_conv1d_is_refused_by_name():
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(BaseRefused, match="gpt2"):
        prepare_base(AutoModelForCausalLM.from_config(config), BaseConfig(), "x", ".")


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mamba2", dict(num_heads=4, head_dim=16, state_size=8, n_groups=1)),
        ("mamba", {}),
        ("jamba", dict(num_attention_heads=2, num_key_value_heads=2, num_experts=1)),
        ("olmo_hybrid", dict(num_attention_heads=2, num_hidden_layers=4, pad_token_id=0)),
        ("recurrent_gemma", dict(num_attention_heads=2, num_hidden_layers=3)),
        ("minimax", dict(num_attention_heads=2, num_local_experts=1)),
        ("kimi_linear", dict(num_attention_heads=2, pad_token_id=0)),
        ("rwkv", {}),
    ],
)
def test_layers_that_carry_state_in_a_way_we_do_not_know_are_refused_by_name(model_type, options):
    small = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=32)
    config = AutoConfig.for_model(model_type, **{**small, **options})
    with pytest.raises(BaseRefused, match=model_type):
        prepare_base(AutoModelForCausalLM.from_config(config), BaseConfig(), "x", ".")


def test_a_model_whose_attention_we_do_not_express_is_refused(monkeypatch):
    """The self-check stands between a silent difference and a served model."""
    forget_window = lambda q, *_: torch.zeros_like(q)  # noqa: E731
    monkeypatch.setattr("lora_runtime.base.model.varlen_attention._masked_attention", forget_window)
    with pytest.raises(BaseRefused, match="does not give its own logits"):
        tiny_base("gemma2")
