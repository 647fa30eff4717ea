"""What the check at load finds out of a model by running it, on models that were changed for it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import create_chunked_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama import modeling_llama

from lora_runtime.base.loader import prepare_base
from lora_runtime.base.model.attention import KVCache, KVLayout, KVShape, PagedAttention
from lora_runtime.config import BaseConfig
from lora_runtime.errors import BaseRefused
from lora_runtime.kernels import AttentionMeta
from tests.tiny import tiny_model


def prepared(model):
    return prepare_base(model, BaseConfig(quantization="none"), "x", ".")


@pytest.mark.parametrize(
    ("made_by", "option"),
    [
        (create_sliding_window_causal_mask, {"sliding_window": 100}),
        (create_chunked_causal_mask, {"attention_chunk_size": 128}),
    ],
)
def test_a_mask_that_matters_only_beyond_the_rows_of_the_check_is_found(
    monkeypatch, made_by, option
):
    """The rows have 5 and 23 tokens; the model takes 512."""
    model = tiny_model("llama")
    for name, value in option.items():
        setattr(model.config, name, value)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", made_by)
    with pytest.raises(BaseRefused, match="layer 0 .*does not attend to all earlier tokens"):
        prepared(model)


def test_a_mask_that_our_window_says_too_is_served():
    """Mistral's layers give the window to the attention function."""
    base = prepared(tiny_model("mistral"))
    assert base.kv_layout == KVLayout.uniform(3, 2, 16)


def test_options_of_attention_that_ours_has_not_are_refused(monkeypatch):
    forward = modeling_llama.LlamaAttention.forward
    bias = torch.ones(4)
    monkeypatch.setattr(
        modeling_llama.LlamaAttention,
        "forward",
        lambda self, *args, **kwargs: forward(self, *args, position_bias=bias, **kwargs),
    )
    with pytest.raises(BaseRefused, match="gives its attention position_bias"):
        prepared(tiny_model("llama"))


def test_a_layer_that_does_not_attend_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(BaseRefused, match=r"layer 1 \(.*LlamaDecoderLayer\) does not attend"):
        prepared(model)


def test_what_only_the_last_layer_brings_to_a_token_is_found():
    """No layer attends behind it, so nothing but the token's own logits shows it."""
    model = tiny_model("llama")
    forward = modeling_llama.LlamaMLP.forward

    def shifted(x):
        before = x.roll(1, dims=1)
        before[:, 0] = 0
        return forward(last, x + 0.5 * before)

    last = model.model.layers[-1].mlp
    last.forward = shifted
    with pytest.raises(BaseRefused, match="brings values from one to another"):
        prepared(model)


def test_layers_that_keep_nothing_have_no_place_in_the_cache():
    base = prepared(tiny_model("nemotron-h"))
    assert base.kv_layout == KVLayout((KVShape(2, 16),), (None, None, 0, None))
    assert base.allocate_states(3).num_slots == 3 and not base.spec.can_reorder_layers
    cache = base.allocate_kv(8)
    assert cache.num_cache_slots == 8 and cache.of_layer(2)[0].shape == (8, 2, 16)
    with pytest.raises(LookupError, match="layer 1 does not attend"):
        cache.of_layer(1)


def test_sinks_of_attention_are_served():
    assert prepared(tiny_model("gpt-oss")).spec.routers


def test_a_layer_that_attends_twice_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(BaseRefused, match="layer 0 .*attends more than once"):
        prepared(model)


def test_a_value_that_goes_from_token_to_token_beside_attention_is_found(monkeypatch):
    """A convolution of two tokens has the same numbers for a row that is alone and whole."""
    forward = modeling_llama.LlamaMLP.forward

    def shifted(self, x):
        before = x.roll(1, dims=1)
        before[:, 0] = 0
        return forward(self, x + 0.5 * before)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", shifted)
    with pytest.raises(BaseRefused, match="brings values from one to another"):
        prepared(tiny_model("llama"))


def test_whatever_transformers_raises_is_refused_by_name(monkeypatch):
    def broken(self, x):
        raise KeyError("full_attention")

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", broken)
    with pytest.raises(BaseRefused, match="llama cannot be served: .*KeyError"):
        prepared(tiny_model("llama"))


def test_memory_errors_are_not_refusals(monkeypatch):
    def full(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        prepared(tiny_model("llama"))


def test_layers_of_different_shapes_and_shared_ones_lie_apart_in_the_cache():
    layout = KVLayout((KVShape(2, 16), KVShape(1, 32), KVShape(2, 8)), (0, 1, 1, 2, 0))
    assert not layout.is_uniform and layout.values_per_token == 2 * (32 + 32 + 16)
    cache = KVCache.allocate(layout, 12, torch.empty(0))
    for index, shape in enumerate(layout.shapes):
        layer = layout.kept_by.index(index)
        assert cache.is_kept(layer)
        for memory in cache.of_layer(layer):
            assert memory.shape == (12, *shape)
            memory.fill_(index + 1.0)
    assert not cache.is_kept(2) and not cache.is_kept(4)
    assert all(torch.equal(a, b) for a, b in zip(cache.of_layer(2), cache.of_layer(1), strict=True))
    assert all(float(memory.mean()) == i + 1 for i in range(2) for memory in cache.of_layer(i))
    assert cache.keys.numel() == cache.values.numel() == 12 * (32 + 32 + 16)


def test_a_layer_that_reads_anothers_cache_does_not_write_it():
    layout = KVLayout((KVShape(1, 8),), (0, 0))
    cache = KVCache.allocate(layout, 4, torch.empty(0))
    meta = AttentionMeta(
        rows=torch.zeros(1, dtype=torch.int32), positions=torch.zeros(1, dtype=torch.int32),
        cache_slots=torch.tensor([2]), block_tables=torch.tensor([[1]], dtype=torch.int32),
        block_size=2,
    )  # fmt: skip
    q, k, v = torch.randn(3, 1, 1, 8)
    options = {"scale": 1.0, "window": None, "softcap": None}
    attention = PagedAttention(cache, meta)
    attention.attend(q, k, v, layer=0, **options)
    out = attention.attend(q, torch.full_like(k, float("nan")), v, layer=1, **options)
    torch.testing.assert_close(out, v)


def test_layers_without_keyword_arguments_for_their_attention_are_handed_them(monkeypatch):
    layer = modeling_llama.LlamaDecoderLayer
    forward = layer.forward

    def swallows(self, hidden_states, attention=None, **kwargs):
        return forward(self, hidden_states, **kwargs)

    monkeypatch.setattr(layer, "forward", swallows)
    monkeypatch.setattr("lora_runtime.base.loader.fuse_modules", lambda model: None)
    base = prepared(tiny_model("llama"))
    kinds = {type(one).__name__ for one in base.model.model.layers}
    assert kinds == {"HandingOnLlamaDecoderLayer"}


def test_a_recurrent_layer_that_carries_nothing_is_refused():
    """A row would have no state, and the base would seem to have no such layers."""
    config = tiny_model("lfm2").config
    config.conv_L_cache = 1
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(BaseRefused, match="layers.0.conv .*over one token"):
        prepared(model)
