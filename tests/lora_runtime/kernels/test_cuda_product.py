"""four_bit_product.cu as its compiler made it: on a GPU if there is one, else its PTX run by
ptx_interpreter.py behind the launcher that a GPU would use.

Weights are held against bitsandbytes bit by bit, products against float64. Without nvcc, NVRTC and
a GPU the source is not compiled, and these tests are skipped.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_runtime.kernels import NestedScales
from lora_runtime.kernels.counters import counters
from lora_runtime.kernels.cuda import product as cuda_product
from lora_runtime.kernels.cuda.product import (
    MAX_ROWS,
    VARIANTS,
    Variant,
    four_bit_product,
    plan,
)
from tests.lora_runtime.kernels import cuda_compiler
from tests.lora_runtime.kernels.on_triton import DEVICE
from tests.lora_runtime.kernels.ptx_interpreter import Kernel, Machine

HAS_GPU = DEVICE == "cuda"
LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""(out, in) of Llama-3.1-8B's launches."""
ROWS = (1, 2, 7, 8, 9, 17, 33, 64, 65, MAX_ROWS)
MULTIPROCESSORS = 2
"""Of the stand-in: so few that shapes which can be interpreted still have several programs."""


@pytest.fixture(scope="module")
def compile_cuda():
    compiler = cuda_compiler.find()
    if compiler is None:
        pytest.skip("neither nvcc nor NVRTC is on this machine: the source was NOT compiled")
    return compiler


@pytest.fixture(scope="module")
def interpreted(compile_cuda):
    return Interpreted(compile_cuda)


class Interpreted:
    """Stands for the device: runs the PTX, with splits that arrive in a random order."""

    def __init__(self, compile_cuda) -> None:
        self.compile, self.arrivals = compile_cuda, np.random.default_rng(0)
        self.kernels: dict[tuple, Kernel] = {}

    def function(self, device, variant, gate, is_nested):
        key = (variant, gate, is_nested)
        if key not in self.kernels:
            source = cuda_product.SOURCE.read_text(encoding="utf-8")
            ptx, _ = self.compile(source, variant.options(gate, is_nested), "compute_80")
            self.kernels[key] = Kernel.parse(ptx.decode(), "four_bit_product")
        return self.kernels[key]

    def launch(self, kernel, cut, tensors, numbers, *, overlaps):
        y, partial = tensors[:2]
        y.fill_(torch.nan)  # memory is never what a kernel should have written
        partial.fill_(torch.nan)
        arguments = [*map(as_numpy, tensors), *numbers]
        Machine(kernel, cut.grid, (32 * cut.warps, 1, 1), arguments, self.arrivals).run()


def as_numpy(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@pytest.fixture
def product(request, monkeypatch):
    """`four_bit_product`, on the device that there is."""
    if not HAS_GPU:
        stand_in = request.getfixturevalue("interpreted")
        monkeypatch.setattr(cuda_product, "_function", stand_in.function)
        monkeypatch.setattr(cuda_product, "launch", stand_in.launch)
        monkeypatch.setattr(cuda_product, "_multiprocessors", lambda device: MULTIPROCESSORS)
    return four_bit_product


class Weight:
    """Random codes under scales of many magnitudes, and bitsandbytes' values of them."""

    def __init__(self, out_features: int, in_features: int, kind: str = "nf4") -> None:
        size, quant_type = out_features * in_features, kind[:3]
        self.shape, self.nested = (out_features, in_features), None
        self.packed = torch.randint(0, 256, (size // 2,), dtype=torch.uint8)
        self.absmax = scales = torch.exp(torch.empty(size // 64).uniform_(-12, 2))
        self.code = bnb.get_4bit_type(quant_type, device="cpu")
        if kind == "nf4-double":
            offset = scales.mean()
            self.absmax, state = bnb.quantize_blockwise(scales - offset, blocksize=256)
            scales = bnb.dequantize_blockwise(self.absmax, state) + offset
            offsets = offset.expand(len(state.absmax)).clone()
            self.nested = NestedScales(state.absmax, state.code, offsets)
        state = bnb.QuantState(
            absmax=scales, shape=torch.Size(self.shape), code=self.code, blocksize=64,
            quant_type=quant_type, dtype=torch.float32,
        )  # fmt: skip
        self.values = bnb.dequantize_4bit(self.packed[:, None], state).view(self.shape).bfloat16()

    def product(self, product, x: Tensor, gate: str = "") -> Tensor:
        nested = self.nested and NestedScales(*(part.to(DEVICE) for part in self.nested))
        arguments = (part.to(DEVICE) for part in (x, self.packed, self.absmax, self.code))
        return product(*arguments, self.shape[0], nested, gate).cpu()

    def exact(self, x: Tensor) -> Tensor:
        return x.double() @ self.values.double().T


@pytest.mark.parametrize(
    ("kind", "num_rows"), [("nf4", 8), ("nf4-double", 16), ("fp4", 32), ("nf4", 64)]
)
def test_weights_are_those_of_bitsandbytes(kind, num_rows, product):
    """Products with single ones are the weights themselves, wherever the kernel takes them from."""
    weight = Weight(int(torch.randint(1, 60, ())), 64 * int(torch.randint(1, 7, ())), kind)
    inputs = torch.randperm(weight.shape[1])[:64]
    ones = torch.eye(weight.shape[1])[inputs].bfloat16()
    rows = [weight.product(product, part) for part in ones.split(num_rows)]
    assert torch.equal(torch.cat(rows).T, weight.values[:, inputs])


@pytest.mark.parametrize("num_rows", ROWS)
def test_products_agree_with_float64(num_rows, product):
    """Within a rounding of y to bfloat16 and one of each sum to float32."""
    out_features, in_features = int(torch.randint(1, 100, ())), 64 * int(torch.randint(1, 18, ()))
    weight = Weight(out_features, in_features)
    x = torch.randn(num_rows, in_features).bfloat16()
    y, exact = weight.product(product, x).double(), weight.exact(x)
    magnitude = x.double().abs() @ weight.values.double().abs().T
    bound = 2**-8 * exact.abs() + 2**-24 * (in_features / 8 + 16) * magnitude
    assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("kind", "num_rows", "activation"), [("nf4-double", 3, "silu"), ("nf4", 20, "gelu_tanh")]
)
def test_a_gated_product_is_the_activation_of_the_product(kind, num_rows, activation, product):
    """Of both halves, each rounded to bfloat16 first; with splits, a width that fills no tile."""
    weight = Weight(2 * 43, 64 * 17, kind)
    x = (torch.randn(num_rows, weight.shape[1]) / 40).bfloat16()
    gate, up = weight.product(product, x).float().chunk(2, 1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    y = weight.product(product, x, activation).float()
    torch.testing.assert_close(y, act * up, rtol=2**-7, atol=1e-6)


def test_a_row_is_the_same_in_any_batch(product):
    """To the bit, whichever variant runs and whichever split ends last."""
    weight = Weight(50, 64 * 17)
    x = torch.randn(70, weight.shape[1]).bfloat16()
    assert plan(70, *weight.shape, False, MULTIPROCESSORS).splits > 1
    y = weight.product(product, x)
    for rows in (slice(0, 1), slice(3, 12), slice(33, 60)):
        assert torch.equal(weight.product(product, x[rows]), y[rows])
    assert not counters(torch.device(DEVICE)).any()


def test_other_rows_and_absent_inputs_are_not_seen(product):
    """A row of NaN spoils no other, in x and in W, where the next row follows a tail."""
    weight = Weight(40, 64 * 5)
    x = torch.randn(3, weight.shape[1]).bfloat16()
    poisoned = x.clone()
    poisoned[1] = torch.nan
    y = weight.product(product, x)
    assert torch.equal(weight.product(product, poisoned)[[0, 2]], y[[0, 2]])
    weight.absmax[5 * 7 : 5 * 8] = torch.nan
    others = torch.arange(40) != 7
    assert torch.equal(weight.product(product, x)[:, others], y[:, others])


@pytest.mark.parametrize("num_rows", [1, 16, 32, 64])
@pytest.mark.parametrize("shape", LLAMA_8B.values(), ids=LLAMA_8B.keys())
def test_an_h100_has_all_its_multiprocessors_at_work(shape, num_rows):
    """No multiprocessor has more than 1/0.9 of its share."""
    cut = plan(num_rows, *shape, False, 132)
    programs = -(-cut.grid[0] * cut.splits // 132)
    share = cut.tiles * -(-shape[1] // 256) / 132
    assert share / (programs * cut.warps * cut.chunks_per_split) >= 0.9


@pytest.mark.parametrize(
    ("target", "variant"),
    [*(("sm_120", v) for v in VARIANTS), *((f"sm_{n}", VARIANTS[-1]) for n in (80, 89, 90))],
    ids=lambda value: f"{8 * value.row_tiles} rows" if isinstance(value, Variant) else value,
)
def test_it_compiles_without_spills(target, variant, compile_cuda):
    """Within the registers and the shared memory of each kind of card; sm_120 takes most."""
    source = cuda_product.SOURCE.read_text(encoding="utf-8")
    _, report = compile_cuda(source, variant.options(2, True), target)
    ((registers, spilled),) = cuda_compiler.resources(report).values()
    assert spilled == 0 and variant.max_warps * 32 * (-(-registers // 8) * 8) <= 65536
    assert variant.shared_bytes <= 98 * 1024


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_is_not_taken():
    assert not cuda_product.can_run(torch.zeros(1, 64, dtype=torch.bfloat16))
