"""The kernel of bench/nf4_product.cu by its numpy twin, behind the launcher that a GPU would use.

The twin stands where the compiled kernel would: plans, permutation, splits and tails are the
launcher's own. Weights are held against bitsandbytes bit by bit, products against float64.
"""

from __future__ import annotations

from functools import partial

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from torch import Tensor

from bench import nf4_product
from bench.nf4_product import VARIANTS, Launch, Variant, four_bit_product, plan, variant_for
from tests.bench import cuda_compiler, nf4_twin
from tests.bench.ptx_interpreter import Kernel, Machine

LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""(out, in) of Llama-3.1-8B's launches."""
ROWS = (1, 2, 5, 8, 9, 16, 17, 32, 33, 47, 64)


def as_numpy(argument: Tensor | int) -> np.ndarray | int:
    if not isinstance(argument, Tensor):
        return argument
    is_bfloat16 = argument.dtype == torch.bfloat16
    return (argument.view(torch.uint16) if is_bfloat16 else argument).numpy()


class TwinKernels:
    """Stands for the compiled kernels; remembers the grids of products."""

    def __init__(self, seed: int) -> None:
        self.arrivals = np.random.default_rng(seed)
        self.grids: list[tuple[int, int, int]] = []

    def __call__(self, name, variant):
        if name == "permute_rows":
            return partial(self.launch, partial(nf4_twin.permute_rows, variant))
        return partial(self.launch, partial(nf4_twin.nf4_product, variant, self.arrivals))

    def launch(self, function, *, grid, block, args):
        args[0].fill_(torch.nan)  # memory is never what a kernel should have written
        function(grid, block, *map(as_numpy, args))
        self.grids.append(grid)


@pytest.fixture
def twins(monkeypatch):
    kernels = TwinKernels(seed=0)
    monkeypatch.setattr(nf4_product, "kernel", kernels)
    monkeypatch.setattr(nf4_product, "multiprocessors", lambda device: 8)
    return kernels


class Weight:
    """Random codes under scales of many magnitudes, and bitsandbytes' values of them."""

    def __init__(self, out_features: int, in_features: int, quant_type: str) -> None:
        size = out_features * in_features
        self.shape = (out_features, in_features)
        self.packed = torch.randint(0, 256, (size // 2,), dtype=torch.uint8)
        self.absmax = torch.exp(torch.empty(size // 64).uniform_(-12, 5))
        self.code = bnb.get_4bit_type(quant_type, device="cpu")
        state = bnb.QuantState(
            absmax=self.absmax, shape=torch.Size(self.shape), code=self.code, blocksize=64,
            quant_type=quant_type, dtype=torch.float32,
        )  # fmt: skip
        self.values = bnb.dequantize_4bit(self.packed[:, None], state).view(self.shape).bfloat16()

    def product(self, x: Tensor) -> Tensor:
        return four_bit_product(x, self.packed, self.absmax, self.code, self.shape[0])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("num_rows", [8, 16, 32, 64])
def test_weights_are_those_of_bitsandbytes(quant_type, num_rows, twins):
    """Products with single ones are the weights themselves, wherever the kernel takes them from."""
    torch.manual_seed(num_rows)
    weight = Weight(int(torch.randint(1, 60, ())), 64 * int(torch.randint(1, 7, ())), quant_type)
    inputs = torch.randperm(weight.shape[1])[:64]
    ones = torch.eye(weight.shape[1])[inputs].bfloat16()
    rows = [weight.product(part) for part in ones.split(num_rows)]
    assert torch.equal(torch.cat(rows).T, weight.values[:, inputs])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_block_is_dequantised_bit_for_bit(quant_type):
    """Every code at each of a word's eight places, the signs of zeros too, scales down to those
    whose products have no bits left.
    """
    generator = np.random.default_rng(1)
    words = generator.integers(0, 1 << 32, 2000, dtype=np.uint32)
    scale = np.exp(generator.uniform(-100, 80, len(words))).astype(np.float32)
    code = bnb.get_4bit_type(quant_type, device="cpu")
    pairs = nf4_twin.dequantise(nf4_twin.values_of(code.numpy(), scale), words)
    ours = np.stack([pair >> 16 * i & 0xFFFF for pair in pairs for i in range(2)], 1)
    block = np.repeat(words, 8).view(np.uint8)  # a word for each of a block's eight
    state = bnb.QuantState(
        absmax=torch.from_numpy(scale), shape=torch.Size((len(words), 64)), code=code,
        blocksize=64, quant_type=quant_type, dtype=torch.float32,
    )  # fmt: skip
    values = bnb.dequantize_4bit(torch.from_numpy(block)[:, None], state).bfloat16()
    expected = values.view(torch.uint16).numpy().reshape(len(words), 64)[:, :8]
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("num_rows", ROWS)
def test_products_agree_with_float64(num_rows, twins):
    """Within a rounding of y to bfloat16 and one of each sum to float32."""
    torch.manual_seed(num_rows)
    out_features, in_features = int(torch.randint(1, 200, ())), 64 * int(torch.randint(1, 21, ()))
    weight = Weight(out_features, in_features, "nf4")
    x = torch.randn(num_rows, in_features).bfloat16()
    y, exact = weight.product(x).double(), x.double() @ weight.values.double().T
    magnitude = x.double().abs() @ weight.values.double().abs().T
    bound = 2**-8 * exact.abs() + 2**-24 * (in_features / 8 + 16) * magnitude
    assert ((y - exact).abs() <= bound).all()


def test_the_order_in_which_splits_end_changes_no_bit(twins):
    torch.manual_seed(0)
    weight = Weight(100, 64 * 21, "nf4")
    x = torch.randn(3, weight.shape[1]).bfloat16()
    first, *others = [weight.product(x) for _ in range(4)]
    assert max(splits for _, splits, _ in twins.grids) > 2
    assert all(torch.equal(first, y) for y in others)


def test_other_rows_and_absent_inputs_are_not_seen(twins):
    """A row of NaN spoils no other, in x and in W, where the next row follows a tail."""
    torch.manual_seed(0)
    weight = Weight(40, 64 * 5, "nf4")
    x = torch.randn(3, weight.shape[1]).bfloat16()
    poisoned = x.clone()
    poisoned[1] = torch.nan
    y = weight.product(x)
    assert torch.equal(weight.product(poisoned)[[0, 2]], y[[0, 2]])
    weight.absmax[5 * 7 : 5 * 8] = torch.nan
    others = torch.arange(40) != 7
    assert torch.equal(weight.product(x)[:, others], y[:, others])


@pytest.mark.parametrize(
    "x", [torch.zeros(65, 64).bfloat16(), torch.zeros(1, 64), torch.zeros(1, 96).bfloat16()]
)
def test_what_it_cannot_take_is_refused(x, twins):
    with pytest.raises(ValueError, match="65 rows|torch.float32|96"):
        four_bit_product(x, torch.zeros(48, dtype=torch.uint8), torch.ones(1), torch.ones(16), 1)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{8 * v.row_tiles} rows")
@pytest.mark.parametrize("shape", LLAMA_8B.values(), ids=LLAMA_8B.keys())
def test_an_h100_has_all_its_multiprocessors_at_work(shape, variant):
    """No multiprocessor has more than 1/0.95 of its share, and each has six warps or more."""
    out_features, in_features = shape
    launch = plan(variant, out_features, in_features, 132)
    programs = -(-launch.grid[0] * launch.splits // 132)
    share = launch.tiles * in_features / 256 / 132
    assert share / (programs * launch.warps * launch.chunks_per_split) >= 0.95
    assert 6 <= programs * launch.warps <= variant.resident_warps


def test_every_number_of_rows_has_the_smallest_variant():
    sizes = {n: 8 * variant_for(n).row_tiles for n in range(1, 65)}
    assert sizes == {n: min(s for s in (8, 16, 32, 64) if s >= n) for n in range(1, 65)}


@pytest.fixture(scope="module")
def compile_cuda():
    compiler = cuda_compiler.find()
    if compiler is None:
        pytest.skip("neither nvcc nor NVRTC is on this machine: the source was NOT compiled")
    return compiler


@pytest.mark.parametrize(
    ("target", "variant"), [("sm_80", 1), ("sm_89", 3), ("sm_90", 3), ("sm_120", 3)]
)
def test_it_compiles_without_spills(target, variant, compile_cuda):
    """Each kind of GPU, and of the variants those that come close to a thread's share of registers.
    The launcher counts on as many warps as these leave room for, of 65,536 a multiprocessor.
    """
    variant = VARIANTS[variant]
    _, report = compile_cuda(nf4_product.SOURCE, variant.options, target)
    found = cuda_compiler.resources(report)
    assert found.keys() == {"nf4_product", "permute_rows"}
    assert all(spilled == 0 for _, spilled in found.values())
    registers = -(-found["nf4_product"][0] // 8) * 8
    assert variant.resident_warps * 32 * registers <= 65536


class CompiledKernels:
    """Stands for the compiled kernels too, and runs what the compiler made of the source."""

    def __init__(self, compile_cuda) -> None:
        self.compile = compile_cuda

        self.ptx: dict[Variant, str] = {}

    def __call__(self, name, variant):
        if variant not in self.ptx:
            ptx, _ = self.compile(nf4_product.SOURCE, variant.options, "compute_80")
            self.ptx[variant] = ptx.decode()
        return partial(self.launch, Kernel.parse(self.ptx[variant], name))

    def launch(self, kernel, *, grid, block, args):
        args[0].fill_(torch.nan)
        arrivals = np.random.default_rng(2)
        Machine(kernel, grid, block, list(map(as_numpy, args)), arrivals).run()


@pytest.mark.parametrize(
    ("num_rows", "num_blocks", "chunks_per_split"),
    [(3, 25, 4), (16, 17, 2), (31, 17, 2), (61, 25, 4)],
)
def test_the_compiled_kernel_does_what_the_twin_does(
    num_rows, num_blocks, chunks_per_split, twins, compile_cuda, monkeypatch
):
    """Bit by bit, with a shorter last split, idle warps, both tails and a row of W that is NaN: the
    source itself is right, not only its twin.
    """

    def plan_of(variant, out_features, in_features, num_multiprocessors):
        tiles = -(-out_features // (16 * variant.out_tiles))
        splits = -(-in_features // (256 * chunks_per_split))
        return Launch(variant, tiles, 4, splits, chunks_per_split)

    torch.manual_seed(num_rows)
    weight = Weight(int(torch.randint(33, 95, ())), 64 * num_blocks, "nf4")
    weight.absmax[num_blocks * 20 : num_blocks * 21] = torch.nan
    x = torch.randn(num_rows, weight.shape[1]).bfloat16()
    monkeypatch.setattr(nf4_product, "plan", plan_of)
    y = weight.product(x)
    monkeypatch.setattr(nf4_product, "kernel", CompiledKernels(compile_cuda))
    assert torch.equal(weight.product(x).view(torch.int16), y.view(torch.int16))
    assert y.isnan().sum(0).nonzero().flatten().tolist() == [20]
    tiles = plan_of(variant_for(num_rows), *weight.shape, 1).tiles
    assert not nf4_product.counters(x.device, tiles).any()
