"""How long should each GPU kernel take, by its machine code, and which pipe is it that holds it up?

No GPU is used and nothing is measured. The production launchers run against a driver that only
names a card; what they launch for Llama-3.1-8B is compiled, and the main loop's instructions are
counted (gpu_machine_code.py). A launch is then predicted to take

    LAUNCH_US + max(bytes / bandwidth, the tightest pipe) / REACHED, at least what latency takes:
    PROGRAM_US for every program that a multiprocessor runs in turn, PASS_US for every pass of one
    program, and MERGE_US for every part that a last program joins one after another.

The floor is the bytes' time alone. Prints Markdown: python -m bench.gpu_predicted
The constants are guesses. Where bytes or a pipe decide, a prediction may be off by a quarter, and
by a factor of 1.5 where latency does.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu_machine_code import RATES, MachineCode
from lora_runtime import kernels
from lora_runtime.kernels import AttentionMeta
from tests.lora_runtime.kernels import gpu_drives
from tests.lora_runtime.kernels.fake_gpu import CARDS, Launch, launches_on

CARD = CARDS[90]
BYTES_PER_S = 3.0e12
CLOCK_HZ = 1.9e9
REACHED = 0.8
"""Share of a pipe's or of the memory's rate that a good kernel keeps up."""
LAUNCH_US = 2.0
PROGRAM_US = 0.35
PASS_US = 0.45
MERGE_US = 0.35
ROWS = (1, 8, 32, 64)
LINEARS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""(out, in) of Llama-3.1-8B's launches."""
PARTS = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}
"""Linear layers of each launch."""
NUM_LAYERS, HEADS, GROUPS, HEAD_DIM = 32, 32, 8, 128
NUM_ADAPTERS, RANK = 8, 16
BFLOAT16 = torch.bfloat16


def sizeless(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Case:
    """Launches of one op, what they must read and write, and how far their main kernel has to go.

    passes: of the main kernel's loop in one program that has work; busy: how many programs have.
    """

    name: str
    launches: tuple[Launch, ...]
    num_bytes: float
    passes: float
    busy: int
    per_pass: float = 0.0
    """Weights, of one program."""

    @property
    def main(self) -> Launch:
        """The launch of the kernel with the longest loop; the others prepare for it."""
        return max(self.launches, key=lambda launch: code_of(launch).pass_instructions)

    @property
    def code(self) -> MachineCode:
        return code_of(self.main)

    @property
    def floor_us(self) -> float:
        return self.num_bytes / BYTES_PER_S * 1e6

    @property
    def pipe_us(self) -> dict[str, float]:
        """Pipe → microseconds, if all multiprocessors are busy to the end."""
        clocks = self.code.clocks(self.passes * self.busy)
        per_us = CARD.multiprocessors * CLOCK_HZ / 1e6
        return {name: number / per_us for name, number in clocks.items()}

    @property
    def latency_us(self) -> float:
        """Programs in turn, empty ones too, and the passes of one."""
        at_once = CARD.multiprocessors * self.code.programs_at_once(CARD)
        return PROGRAM_US * self.main.num_programs / at_once + PASS_US * self.passes

    @property
    def merge_us(self) -> float:
        sizes = self.main.arguments | self.main.integers
        parts = next((n for name, n in sizes.items() if name.lower().endswith("splits")), 1)
        return MERGE_US * parts if self.code.merges_serially else 0.0

    @property
    def predicted_us(self) -> float:
        rates = max(self.floor_us, *self.pipe_us.values()) / REACHED
        own = max(rates, self.latency_us) + self.merge_us
        return own + LAUNCH_US * len(self.launches)

    @property
    def holds_up(self) -> str:
        """What decides the prediction."""
        times = {"bytes": self.floor_us, **self.pipe_us}
        name = max(times, key=lambda key: times[key])
        return "latency" if self.latency_us > times[name] / REACHED else name


_CODES: dict[str, MachineCode] = {}


def code_of(launch: Launch) -> MachineCode:
    if launch.specialization not in _CODES:
        _CODES[launch.specialization] = MachineCode.of(launch)
    return _CODES[launch.specialization]


def launches_of(action: Callable[[], object]) -> tuple[Launch, ...]:
    with launches_on(CARD) as found:
        action()
    return tuple(found)


def product(name: str, rows: int, kind: str = "nf4") -> Case | None:
    """W x of one linear layer: from codes of 4 bits with an absmax for 64, or of 8 bits. Every
    program goes through its share of W, BLOCK_N outputs by BLOCK_K inputs a pass. None where
    another library than Triton does it.
    """
    out_features, in_features = LINEARS[name]
    size, x = out_features * in_features, sizeless(rows, in_features)
    absmax = sizeless(size // 64, dtype=torch.float32)
    if kind == "nf4":
        packed, table = sizeless(size // 2, dtype=torch.uint8), sizeless(16, dtype=torch.float32)
        found = launches_of(
            lambda: kernels.four_bit_product(x, packed, absmax, table, out_features)
        )
    else:
        codes = sizeless(out_features, in_features, dtype=torch.int8)
        found = launches_of(lambda: kernels.int8_product(x, codes, absmax[:out_features]))
    if not found:
        return None
    moved = size * (9 / 16 if kind == "nf4" else 1) + 2 * rows * (in_features + out_features)
    per_pass = _constant(found, "BLOCK_N") * _constant(found, "BLOCK_K")
    programs = max(launch.num_programs for launch in found)
    return Case(name, found, moved, size / per_pass / programs, programs, per_pass)


def _constant(launches: Iterable[Launch], name: str) -> int:
    return max(launch.arguments.get(name, 0) for launch in launches)


def values(name: str) -> Case:
    """W itself in bfloat16, from its 4-bit codes."""
    size, shape = LINEARS[name][0] * LINEARS[name][1], LINEARS[name]
    packed, table = sizeless(size // 2, dtype=torch.uint8), sizeless(16, dtype=torch.float32)
    absmax = sizeless(size // 64, dtype=torch.float32)
    found = launches_of(lambda: kernels.four_bit_values(packed, absmax, table, shape, BFLOAT16))
    programs = found[-1].num_programs
    return Case(name, found, size * (9 / 16 + 2), 1, programs, size / programs)


def decode(rows: int, length: int) -> Case:
    """Attention of one token a row over `length` cached ones."""
    q = sizeless(rows, HEADS, HEAD_DIM)
    cache = sizeless(rows * length, GROUPS, HEAD_DIM)
    meta = AttentionMeta(
        rows=sizeless(rows, dtype=torch.int32),
        positions=sizeless(rows, dtype=torch.int32),
        cache_slots=sizeless(rows, dtype=torch.int64),
        block_tables=sizeless(rows, length // 16, dtype=torch.int32),
        block_size=16,
    )
    found = launches_of(lambda: kernels.paged_attention(q, cache, cache, meta, 0.1))
    programs = found[-1].num_programs
    passes = rows * GROUPS * length / _constant(found, "BLOCK_K") / programs
    moved = 2 * cache.nbytes + 2 * q.nbytes
    return Case(f"{rows} × {length:,}", found, moved, passes, programs)


def decode_step(rows: int, num_adapters: int, num_layers: int) -> tuple[list[Launch], Counter[str]]:
    """What a decode step of some layers launches as it is captured: by Triton, and all by name."""
    plan = gpu_drives.step([40] * rows, [1] * rows, num_adapters)
    with launches_on(CARD) as launches:
        base = gpu_drives.sizeless_base(gpu_drives.LLAMA, BFLOAT16, num_layers=num_layers)
        runner = gpu_drives.sizeless_runner(base)
        runner.use_graphs(rows, 1024, gpu_drives.Captured())
        launches.clear()
        with TorchLaunches() as others, torch.inference_mode():
            runner.logits(plan)
    return launches, others.names + Counter(launch.kernel for launch in launches)


def launches_a_layer(rows: int, num_adapters: int) -> tuple[Counter[str], Counter[str]]:
    """Names of what one layer launches, and of what a step does outside of its layers."""
    one, two = (decode_step(rows, num_adapters, n)[1] for n in (1, 2))
    layer = two - one
    return layer, one - layer


def expands(launches: list[Launch], rows: int, count: int) -> list[Case]:
    """The launches of one layer that are the adapters' alone."""
    own, cases = [launch for launch in launches if "expand" in launch.kernel], []
    for (name, (out_features, _)), launch in zip(LINEARS.items(), own, strict=True):
        busy = launch.num_programs // launch.grid[0] * min(count, launch.grid[0])
        moved = 2 * count * RANK * out_features + 4 * rows * out_features
        cases.append(Case(f"expand {name}", (launch,), moved, 1, busy))
    return cases


@dataclass(frozen=True)
class Shrink:
    """The part of a product's launch that is the adapters': it has no launch of its own."""

    launch: Launch
    num_programs: int
    num_bytes: float

    @classmethod
    def of(cls, launch: Launch, name: str, rows: int, count: int) -> Shrink:
        alone = product(name, rows)
        assert alone is not None
        moved = 2 * count * RANK * PARTS[name] * LINEARS[name][1]
        return cls(launch, launch.num_programs - alone.main.num_programs, moved)

    @property
    def floor_us(self) -> float:
        return self.num_bytes / BYTES_PER_S * 1e6

    @property
    def predicted_us(self) -> float:
        """Its bytes, or its programs in turn, empty ones too, beside the product's."""
        at_once = CARD.multiprocessors * code_of(self.launch).programs_at_once(CARD)
        return max(self.floor_us / REACHED, PROGRAM_US * self.num_programs / at_once)


def shrinks(launches: list[Launch], rows: int, count: int) -> list[Shrink]:
    own = [launch for launch in launches if "shrink" in launch.kernel]
    pairs = zip(LINEARS, own, strict=True)
    return [Shrink.of(launch, name, rows, count) for name, launch in pairs]


class TorchLaunches(TorchDispatchMode):
    """Names of torch's own operations that compute something: no views, nothing allocated."""

    QUIET = ("empty", "zeros", "detach", "new_empty", "new_zeros", "_to_copy", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and not name.startswith(self.QUIET):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def table(columns: str, rows: Iterable[Iterable[object]]) -> None:
    names = columns.split(" | ")
    print(f"\n| {columns} |\n|{'---|' * len(names)}")
    for row in rows:
        cells = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row)
        print(f"| {' | '.join(cells)} |")


def code_table(cases: Iterable[tuple[str, Case | None]]) -> None:
    """The machine code of the main kernels, once each."""
    print("\n## Machine code of the main kernels\n")
    print(
        "Rates are weights a clock and multiprocessor that a pipe allows; bytes at the floor allow"
    )
    print(f"{BYTES_PER_S * 16 / 9 / CARD.multiprocessors / CLOCK_HZ:.1f} in 4 bits.")
    columns = (
        "kernel | case | warps | registers | spills | shared | programs an SM | pass | a weight | "
        f"barriers | {' | '.join(RATES)}"
    )
    rows = []
    for name, case in cases:
        if case is None:
            continue
        code, weights = case.code, case.per_pass
        clocks = code.clocks(1)
        rates = [weights / n if n and weights else "" for n in clocks.values()]
        per_weight = 32 * code.num_warps * code.pass_instructions / weights if weights else ""
        rows.append(
            (
                case.main.kernel, f"{name} {case.name}", code.num_warps, code.registers,
                code.stack_bytes, code.shared_bytes, code.programs_at_once(CARD),
                code.pass_instructions, per_weight, code.barriers, *rates,
            )
        )  # fmt: skip
    table(columns, rows)


def time_table(title: str, cases: Iterable[Case]) -> None:
    print(f"\n## {title}")
    rows = [
        (
            case.name, len(case.launches), case.main.num_programs, case.floor_us,
            case.predicted_us, case.predicted_us / case.floor_us, case.holds_up,
        )
        for case in cases
    ]  # fmt: skip
    table("case | launches | programs | floor µs | predicted µs | over floor | held up by", rows)


def products_table(kind: str) -> None:
    """Floor and prediction of every linear layer, and of all in a step."""
    print(f"\n## Products from {kind}: floor; predicted µs; held up by")
    rows = []
    for num_rows in ROWS:
        found = (product(name, num_rows, kind) for name in LINEARS)
        cases = [case for case in found if case is not None]
        if len(cases) < len(LINEARS):
            rows.append((num_rows, *["not in Triton"] * len(LINEARS), "", ""))
            continue
        cells = [f"{c.floor_us:.1f}; {c.predicted_us:.0f}; {c.holds_up}" for c in cases]
        floor, time = (sum(getattr(c, n) for c in cases) for n in ("floor_us", "predicted_us"))
        step = f"{floor * NUM_LAYERS / 1e3:.2f}; {time * NUM_LAYERS / 1e3:.2f}"
        rows.append((num_rows, *cells, step, time / floor))
    table(f"rows | {' | '.join(LINEARS)} | all of a step, ms | over floor", rows)


def adapters_table() -> None:
    """Shrink is part of the products' launches, so its time is what they take longer."""
    print(f"\n## Adapters of a layer, up to {NUM_ADAPTERS} of rank {RANK}, in a decode graph")
    rows = []
    for num_rows in ROWS:
        count = min(num_rows, NUM_ADAPTERS)
        launches, _ = decode_step(num_rows, count, 1)
        shrunk, expanded = (make(launches, num_rows, count) for make in (shrinks, expands))
        floor = sum(part.floor_us for part in (*shrunk, *expanded))
        times = [sum(part.predicted_us for part in own) for own in (shrunk, expanded)]
        programs = [sum(part.num_programs for part in shrunk)]
        programs.append(sum(case.main.num_programs for case in expanded))
        registers = max(case.code.registers for case in expanded)
        rows.append((num_rows, *programs, registers, floor, *times, sum(times) / floor))
    table(
        "rows | programs of shrink | of expand | registers of expand | floor µs | shrink µs | "
        "expand µs | over floor",
        rows,
    )


def launches_table() -> None:
    print("\n## Launches of a decode step, Triton's and torch's, a layer and outside the layers")
    rows = []
    for num_adapters in (0, NUM_ADAPTERS):
        layer, outside = launches_a_layer(NUM_ADAPTERS, num_adapters)
        per_step = layer.total() * NUM_LAYERS + outside.total()
        names = ", ".join(f"{n} {name}" for name, n in sorted(layer.items()))
        rows.append((num_adapters, layer.total(), outside.total(), per_step, names))
    table("adapters | a layer | outside | a step | which, a layer", rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        print("# Predicted times of the GPU kernels: counted in machine code, not measured\n")
        print(f"sm_{CARD.arch}, {CARD.multiprocessors} multiprocessors, {CLOCK_HZ / 1e9} GHz,")
        print(f"{BYTES_PER_S / 1e12} TB/s; shapes of Llama-3.1-8B in bfloat16.")
        kinds = ("nf4", "int8")
        cases = [
            (f"{kind}, {n} rows,", product("gate_up", n, kind)) for kind in kinds for n in ROWS
        ]
        values_cases = [values(name) for name in LINEARS]
        decode_cases = [decode(32, 1024), decode(1, 8192)]
        code_table(
            [*cases, ("values,", values_cases[2]), *(("decode", case) for case in decode_cases)]
        )
        for kind in kinds:
            products_table(kind)
        time_table("Values: dequantising a layer's weights", values_cases)
        time_table("Attention of decode steps, rows × cached tokens", decode_cases)
        adapters_table()
        launches_table()


if __name__ == "__main__":
    main()
