"""Rows of several layer maps in one packed batch against dense models of the stacked layers."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from random import Random

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Gemma3Config

from lora_runtime.base.model.adapted_linear import StepContext
from lora_runtime.base.model.layer_order import shortest_order
from lora_runtime.base.model.layer_steps import layer_steps
from lora_runtime.base.model.reordered_model import (
    LayerStep,
    LayerSteps,
    ReorderedLayer,
    reordered_model,
)
from lora_runtime.base.model.rotary import fix_rotary
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.kernels import Span, StepMeta, gpu
from tests.lora_runtime.kernels.on_triton import DEVICE
from tests.tiny import CONFIGS, VOCAB_SIZE, dense_twin, tiny_base

PLAIN = (0, 1, 2)
MAPS = [PLAIN, (0, 1, 0, 1, 2), PLAIN, (1, 2, 2, 0)]
LENGTHS = [40, 30, 3, 70]
"""Longer than the sliding windows and longrope's original length, and shorter."""
ENDS = list(zip(torch.tensor(LENGTHS).cumsum(0).tolist(), LENGTHS, strict=True))


@pytest.fixture
def token_ids():
    return torch.randint(2, VOCAB_SIZE, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


def laid_out(maps, adapters=None):
    """The layers of the shortest plan, and which tokens run at each of them."""
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    steps = []
    for step in shortest_order(frozenset(maps)):
        here = [row for row, layer_map in enumerate(maps) if layer_map in dict(step.positions)]
        tokens = torch.isin(owner, torch.tensor(here)).nonzero()[:, 0]
        is_all = len(here) == len(maps)
        attention = VarlenAttention([RowLengths([LENGTHS[row] for row in here])])
        steps.append(LayerStep(step.layer, None if is_all else tokens, attention, adapters))
    return LayerSteps(steps)


@torch.no_grad()
def planned_logits(base, maps, token_ids):
    """Logits of every token, one (length, vocab) for each row."""
    steps = laid_out(maps)
    embedded = base.model.get_input_embeddings()(token_ids[None])
    return logits_of(reordered_model(base.model, steps.layers, base.context), embedded, steps)


@torch.no_grad()
def logits_of(model, embedded, batch):
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    out = model(inputs_embeds=embedded, position_ids=positions, use_cache=False, attention=batch)
    return out.logits[0].split(LENGTHS)


def stacked(twin, layer_map):
    """A transformers model of its own with deep copies of these layers."""
    model = copy.deepcopy(twin)
    model.model.layers = nn.ModuleList(copy.deepcopy(twin.model.layers[i]) for i in layer_map)
    for config in (model.config, model.model.config):
        config.num_hidden_layers = len(layer_map)
        if getattr(config, "layer_types", None):
            config.layer_types = [twin.config.layer_types[i] for i in layer_map]
    return model


def assert_close(got, expected):
    """Within 1e-5 of the largest logit."""
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shape", CONFIGS)
@torch.no_grad()
def test_each_row_equals_its_own_stacked_model_alone(shape, token_ids):
    base = tiny_base(shape)
    twin = dense_twin(base, shape)
    fix_rotary(twin, base.spec.max_model_len)
    logits = planned_logits(base, MAPS, token_ids)
    for row, layer_map, got in zip(token_ids.split(LENGTHS), MAPS, logits, strict=True):
        assert_close(got, stacked(twin, layer_map)(row[None], use_cache=False).logits[0])


@pytest.mark.parametrize("shape", ["llama", "gemma2"])
def test_a_layer_that_makes_the_next_ones_norm_may_be_followed_by_another(
    monkeypatch, shape, token_ids
):
    """Fused layers, whose last sum and the norm behind it are one launch."""
    monkeypatch.setitem(globals(), "LENGTHS", [5, 4, 1, 6])
    base, token_ids = tiny_base(shape), token_ids[:16]
    expected = planned_logits(base, MAPS, token_ids)
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})
    for got, wanted in zip(planned_logits(base, MAPS, token_ids), expected, strict=True):
        assert_close(got, wanted)


@torch.no_grad()
def test_a_replicated_row_equals_peft(token_ids):
    base = tiny_base("llama")
    config = peft.LoraConfig(layer_replication=[[0, 2], [1, 3]], target_modules=["q_proj"])
    replicated = peft.get_peft_model(dense_twin(base, "llama"), config).eval()
    logits = planned_logits(base, [PLAIN, (0, 1, 1, 2), PLAIN, PLAIN], token_ids)
    row = token_ids.split(LENGTHS)[1]
    assert_close(logits[1], replicated(row[None], use_cache=False).logits[0])


def test_each_row_runs_its_own_layers_and_no_others(token_ids):
    base = tiny_base("qwen3")
    calls, tokens = Counter(), Counter()

    def count(layer, arguments):
        calls[layer.self_attn.layer_idx] += 1
        tokens[layer.self_attn.layer_idx] += arguments[0].shape[1]

    for layer in base.model.model.layers:
        layer.register_forward_pre_hook(count)
    for maps in (MAPS, [PLAIN] * len(MAPS), [MAPS[1]] * len(MAPS)):
        calls.clear(), tokens.clear()
        planned_logits(base, maps, token_ids)
        assert calls.total() == len(shortest_order(frozenset(maps)))
        for layer in PLAIN:
            visits = [layer_map.count(layer) for layer_map in maps]
            assert tokens[layer] == sum(n * v for n, v in zip(LENGTHS, visits, strict=True))


@pytest.mark.parametrize("shape", ["gemma3", "llama"])
def test_the_original_is_left_alone(shape, token_ids):
    base = tiny_base(shape)
    model = base.model

    def seen():
        modules = [(path, id(module)) for path, module in model.named_modules()]
        pointers = {name: value.data_ptr() for name, value in model.state_dict().items()}
        values = {name: value.clone() for name, value in model.state_dict().items()}
        embedded = model.get_input_embeddings()(token_ids[None])
        logits = logits_of(model, embedded, VarlenAttention([RowLengths(LENGTHS)]))
        return modules, pointers, model.config.to_dict(), values, torch.cat(logits)

    before = seen()
    reordered = reordered_model(model, (2, 0, 0, 1, 2), base.context)
    planned_logits(base, MAPS, token_ids)
    after = seen()
    assert before[:3] == after[:3]
    torch.testing.assert_close(before[3:], after[3:], rtol=0, atol=0)
    assert {id(p) for p in reordered.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("row", range(len(MAPS)))
@pytest.mark.parametrize("shape", ["gemma2", "llama"])
def test_nan_in_one_row_reaches_no_other(shape, row, token_ids):
    base = tiny_base(shape)
    batch = laid_out(MAPS)
    model = reordered_model(base.model, batch.layers, base.context)
    embedded = base.model.get_input_embeddings()(token_ids[None])
    clean = logits_of(model, embedded, batch)
    end, length = ENDS[row]
    embedded[:, end - length : end] = torch.nan
    for other, (got, expected) in enumerate(
        zip(logits_of(model, embedded, batch), clean, strict=True)
    ):
        assert got.isnan().all() if other == row else torch.equal(got, expected)


@pytest.mark.parametrize("seed", range(4))
def test_layer_steps_say_for_every_token_where_its_row_is_in_its_map(seed):
    """Each row's tokens, followed through all steps, visit the layers of the row's map in order."""
    random = Random(seed)
    maps = [tuple(random.choices(range(4), k=random.randint(1, 6))) for _ in range(5)]
    lengths = [random.randint(1, 4) for _ in maps]
    owner = [row for row, length in enumerate(lengths) for _ in range(length)]
    asked = []

    def adapters(rows, visits):
        asked.append((rows, visits))
        return rows, visits

    steps = layer_steps(maps, lengths, "cpu", lambda here: here, adapters)
    walks = [[] for _ in owner]
    for step in steps.steps:
        here = step.attention
        assert step.adapters == (here.rows, here.visits)
        assert (step.tokens is None) == (len(here.rows) == len(maps))
        assert [owner[token] for token in here.tokens] == [
            row for row in here.rows for _ in range(lengths[row])
        ]
        for token in here.tokens.tolist():
            index = here.rows.index(owner[token])
            assert here.positions[index] == len(walks[token])
            assert here.visits[index] == walks[token].count(step.layer)
            walks[token].append(step.layer)
    assert walks == [list(maps[row]) for row in owner]
    assert len(set(asked)) == len(asked), "the same rows at the same visits share their tables"


class Doubling(nn.Module):
    """A layer that keeps what it was given."""

    attention_type = "sliding_attention"

    def forward(self, hidden_states, **given):
        self.given = given
        return 2 * hidden_states


def test_a_layer_gets_its_tokens_and_the_others_keep_theirs():
    layer, attention, context = Doubling(), VarlenAttention([RowLengths([2])]), StepContext()
    tokens = torch.tensor([1, 4])
    hidden, cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    positions = torch.arange(10, 15)[None]
    steps = [LayerStep(0, None, attention, None), LayerStep(0, tokens, attention, None)]
    out = ReorderedLayer(layer, 1, context)(
        hidden,
        position_embeddings=(cos, sin),
        position_ids=positions,
        attention=LayerSteps(steps),
        attention_mask=None,
    )
    assert torch.equal(out[:, [1, 4]], 2 * hidden[:, [1, 4]])
    assert torch.equal(out[:, [0, 2, 3]], hidden[:, [0, 2, 3]])
    assert torch.equal(layer.given["position_ids"], positions[:, [1, 4]])
    assert torch.equal(layer.given["position_embeddings"][0], cos[:, [1, 4]])
    assert torch.equal(layer.given["position_embeddings"][1], sin[:, [1, 4]])
    assert layer.given["attention"] is attention
    assert layer.given["attention_mask"] is None


def test_to_the_decoder_a_planned_layer_looks_like_its_layer():
    layer = Doubling()
    reordered = ReorderedLayer(layer, 0, StepContext())
    assert reordered.attention_type == "sliding_attention"
    with pytest.raises(AttributeError, match="no_such_name"):
        reordered.no_such_name  # noqa: B018


def test_each_step_runs_under_its_own_adapters(token_ids):
    base = tiny_base("llama")
    whole, own = (
        StepMeta.build([Span(slot=slot, first_token=0, num_tokens=3)]) for slot in range(2)
    )
    seen = []
    for layer in base.model.model.layers:
        layer.register_forward_pre_hook(lambda *_: seen.append(base.context.meta))
    steps = list(laid_out(MAPS, own).steps)
    steps[1] = replace(steps[1], adapters=None)
    layers = LayerSteps(steps).layers
    model = reordered_model(base.model, layers, base.context)
    model.model.norm.register_forward_pre_hook(lambda *_: seen.append(base.context.meta))
    with base.context.adapters(whole, {}):
        embedded = base.model.get_input_embeddings()(token_ids[None])
        logits_of(model, embedded, LayerSteps(steps))
    expected = [own, None, *[own] * (len(layers) - 2), whole]
    assert all(got is wanted for got, wanted in zip(seen, expected, strict=True))


def test_a_decoder_inside_a_larger_model_shares_its_planned_config():
    """Gemma 3 with vision: the decoder is two levels down, its config a part of the whole one."""
    text = dict(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=3, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    with torch.device("meta"):
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        model = AutoModelForImageTextToText.from_config(config)
    before = model.config.to_dict()
    reordered = reordered_model(model, (0, 2, 2, 0), StepContext())
    decoder = reordered.get_decoder()
    assert len(decoder.layers) == decoder.config.num_hidden_layers == 4
    assert decoder.config.layer_types == [f"{kind}_attention" for kind in (
        "sliding", "full", "full", "sliding")]  # fmt: skip
    assert reordered.config.get_text_config() is decoder.config
    assert model.config.to_dict() == before
    assert len(model.get_decoder().layers) == 3
