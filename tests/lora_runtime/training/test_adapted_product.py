"""Products in bfloat16 with float32 masters, the road of a GPU, driven on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_runtime.adapters.serving_form import ModuleForm
from lora_runtime.adapters.variants.mutated_base import Factors
from lora_runtime.base.model.quant_linear import DenseLinear
from lora_runtime.kernels import Span
from lora_runtime.training import binding
from lora_runtime.training.adapted_product import (
    AdaptedRows,
    adapted_product,
    factor_dtype,
    rounded_factors,
)
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.losses import unit_logits, window_losses
from tests.lora_runtime.training.tiny_runs import (
    at_every_token,
    make_unit,
    ragged_data,
    randomise,
    train_until_done,
)
from tests.lora_runtime.training.trained_variants import ROWS, VARIANTS, unit_of
from tests.tiny import tiny_base

BFLOAT16_STEP = 2.0**-8
"""Of a value to the next; half of it is lost at most by one rounding."""


@pytest.fixture
def in_bfloat16(monkeypatch):
    monkeypatch.setattr(binding, "factor_dtype", lambda *_: torch.bfloat16)


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(binding, "factor_dtype", lambda *_: torch.float32)


@pytest.mark.parametrize("is_native", [True, False])
def test_the_dtype_follows_device_and_base(monkeypatch, is_native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    single, half, double = torch.float32, torch.bfloat16, torch.float64
    assert factor_dtype(gpu, half, single) is half
    assert factor_dtype(gpu, single, single) is single
    assert factor_dtype(gpu, double, double) is double
    assert factor_dtype(cpu, half, single) is (half if is_native else single)
    assert factor_dtype(cpu, single, single) is single


def random_parts(generator, num_tokens, sizes):
    """Rows of several adapters of other ranks, the second without any and the third with a gain."""
    inputs, outputs = sizes
    forms, slices = [], []
    ends = [0, *sorted(torch.randperm(num_tokens - 1, generator=generator)[:3] + 1), num_tokens]
    for index, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        if index == 1:
            continue
        rank = int(torch.randint(1, 9, (1,), generator=generator))
        a, b, gain = (
            torch.randn(shape, generator=generator)
            for shape in ((rank, inputs), (outputs, rank), outputs)
        )
        forms.append(ModuleForm(a=a, b=b, gain=1 + gain / 8 if index == 2 else None))
        slices.append(slice(int(start), int(end)))
    return forms, slices


def leaves_of(forms, dtype):
    return [
        ModuleForm(
            a=form.a.detach().to(dtype).requires_grad_(),
            b=form.b.detach().to(dtype).requires_grad_(),
            gain=None if form.gain is None else form.gain.detach().to(dtype).requires_grad_(),
        )
        for form in forms
    ]


def tensors_of(forms):
    return [t for form in forms for t in (form.a, form.b, form.gain) if t is not None]


def by_formula(x, weight, forms, slices):
    y = (x @ weight.T).clone()
    for form, rows in zip(forms, slices, strict=True):
        own = y[rows] + x[rows] @ form.a.T @ form.b.T
        y = y.index_copy(
            0, torch.arange(rows.start, rows.stop), own if form.gain is None else form.gain * own
        )
    return y


def gradients(y, weights, x, forms):
    return torch.autograd.grad(y.to(weights.dtype), [x, *tensors_of(forms)], weights)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_whole", [False, True], ids=["any", "multiples of 32"])
@pytest.mark.parametrize("is_turned", [False, True], ids=["rows", "columns"])
def test_values_and_gradients_are_the_formulas(seed, is_whole, is_turned):
    """Relative to their length within two roundings, as there are two between the ends of each. A
    gain's gradient sums products of either sign, each rounded, of sums that were: twice as much.
    Multiples of 32 are what a CPU's tiles take; "columns" are tensors that lie by columns.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 90, (2,), generator=generator).tolist()
    if is_whole:
        sizes = [-(-size // 32) * 32 for size in sizes]
    num_tokens = 20 + 7 * seed
    forms, slices = random_parts(generator, num_tokens, sizes)
    layer = DenseLinear(torch.randn(sizes[::-1], generator=generator).bfloat16(), None)
    x = torch.randn(num_tokens, sizes[0], generator=generator).bfloat16().requires_grad_()
    weights = torch.randn(num_tokens, sizes[1], generator=generator).bfloat16()
    if is_turned:
        forms = [replace(f, a=f.a.T.contiguous().T, b=f.b.T.contiguous().T) for f in forms]
        weights, x = weights.T.contiguous().T, x.detach().T.contiguous().T.requires_grad_()
    ours = leaves_of(forms, torch.float32)
    rounded = rounded_factors([Factors(form.a, form.b) for form in ours], torch.bfloat16)
    adapted = [
        AdaptedRows(rows, form.a, form.b, form.gain, factors)
        for rows, form, factors in zip(slices, ours, rounded, strict=True)
    ]
    y = adapted_product(x, layer, adapted)
    exact = leaves_of(forms, torch.float64)
    x64 = x.detach().double().requires_grad_()
    expected = by_formula(x64, layer.weight.double(), exact, slices)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() <= BFLOAT16_STEP * expected.norm()
    found = gradients(y, weights, x, ours)
    wanted = gradients(expected, weights.double(), x64, exact)
    assert [g.dtype for g in found] == [x.dtype, *(t.dtype for t in tensors_of(ours))]
    for mine, theirs in zip(found, wanted, strict=True):
        is_gain = mine.ndim == 1
        assert (mine - theirs).norm() <= (1 + is_gain) * BFLOAT16_STEP * theirs.norm()
        if mine.dtype == torch.float32 and not is_gain:
            assert (mine == mine.bfloat16()).double().mean() < 0.1, "rounded on its way"


def test_products_in_the_masters_dtype(tmp_path, tokenizer, in_float32):
    """To the last bit: what is added to W x, and the gradients, are sums of float32 factors."""
    base = tiny_base("llama", dtype=torch.bfloat16)
    unit = make_unit(base, tokenizer, UnitConfig(name="u", data=ragged_data(tmp_path / "d", 4)))
    randomise(unit)
    path = "model.layers.1.mlp.up_proj"
    bound, layer = binding.bind([unit], base)[path], base.model.get_submodule(path).linear
    assert not bound.factors
    x = torch.randn(9, layer.in_features).bfloat16().requires_grad_()
    y = bound.linear(x, layer, [Span(slot=0, first_token=0, num_tokens=9)])
    weights = torch.randn(y.shape).bfloat16()
    module = unit.modules[path]
    found = torch.autograd.grad(y, [x, module.a, module.b], weights)
    a, b, of_y = module.a.detach(), module.scaling * module.b.detach(), weights.float()
    product, of_x = layer.tracked_product(x.detach()), weights @ layer.kept_values()
    assert torch.equal(y, torch.addmm(product.float(), x.float() @ a.T, b.T).bfloat16())
    assert torch.equal(found[0], torch.addmm(of_x.float(), of_y @ b, a).bfloat16())
    assert torch.equal(found[1], (of_y @ b).T @ x.float())
    assert torch.equal(found[2], of_y.T @ (x.float() @ a.T) * module.scaling)


def loss_gradients(base, unit, examples):
    losses = window_losses(base, [unit], [examples])
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), unit.parameters)])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_as_well_as_in_float32(
    tmp_path, tokenizer, exact_base, monkeypatch, name
):
    """Its gradient is about as far from float64's as with float32 products: most of the way is the
    rest of the base's. At one place alone either may be nearer by chance, so at several.
    """
    base = tiny_base("llama", quantization="none", dtype=torch.bfloat16)
    unit, twin = (unit_of(on, tokenizer, tmp_path, name) for on in (base, exact_base))
    for part, constant in twin.named_constants().items():
        constant.copy_(unit.named_constants()[part])
    examples = unit.next_micro_batches()[0]
    starts, squares = [p.detach().clone() for p in unit.parameters], []
    for seed in range(5, 9):
        for parameter, start in zip(unit.parameters, starts, strict=True):
            parameter.data.copy_(start)
        randomise(unit, seed=seed)
        for ours, theirs in zip(unit.parameters, twin.parameters, strict=True):
            theirs.data.copy_(ours.data)
        wanted = loss_gradients(exact_base, twin, examples)
        monkeypatch.setattr(binding, "factor_dtype", lambda *_: torch.float32)
        in_float32 = loss_gradients(base, unit, examples)
        monkeypatch.setattr(binding, "factor_dtype", lambda *_: torch.bfloat16)
        in_bfloat16 = loss_gradients(base, unit, examples)
        assert in_bfloat16.dtype == torch.float32 and not torch.equal(in_bfloat16, in_float32)
        squares.append(
            [((g - wanted).norm() / wanted.norm()) ** 2 for g in (in_float32, in_bfloat16)]
        )
    errors = torch.tensor(squares).mean(0).sqrt()
    assert 0 < errors[1] <= 1.5 * errors[0] < 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_starts_at_exactly_the_base(tmp_path, tokenizer, in_bfloat16, name):
    base = tiny_base("llama", dtype=torch.bfloat16)
    unit = unit_of(base, tokenizer, tmp_path, name)
    started = at_every_token(unit_logits(base, unit))(ROWS, True)
    unit.modules = {}  # the base alone, in the unit's order of layers
    for ours, theirs in zip(
        started, at_every_token(unit_logits(base, unit))(ROWS, True), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_updates_smaller_than_a_step_of_bfloat16_add_up(tmp_path, tokenizer, in_bfloat16):
    """The weights that are trained are float32 and are not rounded between updates, each of which
    is less than half a step of what is more than 0.02.
    """
    base = tiny_base("llama", dtype=torch.bfloat16)
    config = UnitConfig(
        name="u", data=ragged_data(tmp_path / "d", 6), rank=4, max_steps=8, warmup=0,
        learning_rate=1e-5, schedule="constant", target_modules=("q_proj",),
    )  # fmt: skip
    unit = make_unit(base, tokenizer, config)
    before = [module.a.detach().clone() for module in unit.modules.values()]
    train_until_done(base, [unit])
    assert unit.step == 8 and all(p.dtype == torch.float32 for p in unit.parameters)
    for module, start in zip(unit.modules.values(), before, strict=True):
        moved = (module.a.detach() - start).abs()
        assert moved[start.abs() > 0.02].median() > 2e-5
