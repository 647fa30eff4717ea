"""What a compiled kernel asks of a multiprocessor, counted in its machine code.

A GPU's multiprocessor has pipes, each with a rate: 4 instructions of any kind are issued a clock
(of 32 lanes each), integer and logic ones run 2 a clock, accesses of shared memory take one
wavefront of 128 bytes a clock. The counts are of one warp and one pass of the kernel's main loop,
which is the largest backward branch; of a kernel without a loop, of all of it. Not counted: bank
conflicts, waits, and the tensor cores' own reads of shared memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.lora_runtime.kernels.fake_gpu import Card, Launch, compiled, tool

INTEGER = (
    "BMSK", "F2FP", "FLO", "FMNMX", "FSEL", "FSETP", "I2F", "I2FP", "IADD3", "ICMP", "IMNMX",
    "ISETP", "LEA", "LOP3", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF", "VIADD",
    "VIADDMNMX", "VIMNMX",
)  # fmt: skip
SHARED = ("LDS", "STS", "LDSM", "STSM", "LDGSTS", "SHFL", "ATOMS")
RATES = {"issue": 4.0, "integer": 2.0, "shared": 1.0, "stores": 2.0, "tensor": 1.0}
"""A clock and multiprocessor: warp instructions, warp instructions, wavefronts of 128 bytes,
sectors of 32 bytes written to the second-level cache, and 2,048 multiply-adds in bfloat16."""
TENSOR_MULTIPLY_ADDS = 2048
_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+ )?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")


@dataclass(frozen=True)
class MachineCode:
    """A launch's kernel as the card runs it. `counts`: of each pipe's RATES, what one warp takes of
    it in one pass; `barriers`: barriers and fences of a pass.
    """

    launch: Launch
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    instructions: int
    """Of the whole kernel."""
    pass_instructions: int
    counts: dict[str, float]
    barriers: int
    merges_serially: bool
    """The last program joins the parts of all in a loop."""

    @classmethod
    def of(cls, launch: Launch) -> MachineCode:
        kernel = compiled(launch)
        cubin = kernel.asm["cubin"]
        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", cubin, "-res-usage"))
        code = Listing(tool("nvdisasm", cubin, "-c"))
        body = code.main_loop()
        return cls(
            launch=launch,
            registers=int(usage[1]),
            stack_bytes=int(usage[2]),
            shared_bytes=kernel.metadata.shared,
            num_warps=kernel.metadata.num_warps,
            instructions=len(code.lines),
            pass_instructions=len(body),
            counts=counts_of(body),
            barriers=sum(name.startswith(("BAR", "MEMBAR", "FENCE")) for name, _ in body),
            merges_serially=code.loops_after_an_atomic(),
        )

    def programs_at_once(self, card: Card) -> int:
        """Programs that a multiprocessor holds: by registers, shared memory, threads, blocks."""
        per_warp = -(-self.registers * 32 // 256) * 256
        warps = card.registers // 4 // per_warp * 4
        return min(
            warps // self.num_warps,
            card.shared_bytes // (self.shared_bytes + 1024),
            card.threads // (32 * self.num_warps),
            card.blocks,
        )

    def clocks(self, passes: float) -> dict[str, float]:
        """Pipe → clocks that one multiprocessor takes for so many passes of a program."""
        warps = passes * self.num_warps
        return {name: warps * count / RATES[name] for name, count in self.counts.items()}


class Listing:
    """Instructions (name, operands) in order, and the loops among them."""

    def __init__(self, text: str) -> None:
        self.lines: list[tuple[str, str]] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(self.lines)
            elif found := _LINE.match(line):
                self.lines.append((found[1], found[2]))
        jumps = [
            (i, re.search(r"\.L_x_\d+", o)) for i, (n, o) in enumerate(self.lines) if n == "BRA"
        ]
        backward = [(labels[to[0]], i) for i, to in jumps if to and labels[to[0]] < i]
        self.loops = sorted(backward, key=lambda loop: loop[1] - loop[0])

    def main_loop(self) -> list[tuple[str, str]]:
        if not self.loops:
            return self.lines
        first, last = self.loops[-1]
        return self.lines[first : last + 1]

    def loops_after_an_atomic(self) -> bool:
        atomics = [i for i, (name, _) in enumerate(self.lines) if name.startswith("ATOMG")]
        return any(first > atomics[-1] for first, _ in self.loops) if atomics else False


def counts_of(body: list[tuple[str, str]]) -> dict[str, float]:
    """Of each pipe of RATES, how much of it one warp takes for these instructions."""
    names = [name for name, _ in body]
    return {
        "issue": len(body),
        "integer": sum(name.partition(".")[0] in INTEGER for name in names),
        "shared": sum(map(_wavefronts, names)),
        "stores": _sectors(names),
        "tensor": sum(map(_tensor_clocks, names)),
    }


def _bytes_a_lane(name: str) -> int:
    if match := re.search(r"\.(U8|S8|U16|S16|64|128)\b", name):
        return {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}[match[1]]
    return 4


def _wavefronts(name: str) -> float:
    kind = name.partition(".")[0]
    if kind not in SHARED:
        return 0
    if kind in ("LDSM", "STSM"):  # matrices of 128 bytes
        return int(name[-1]) if name[-1] in "24" else 1
    return max(1, _bytes_a_lane(name) // 4)


def _tensor_clocks(name: str) -> float:
    """Of one warp's share: a warp group's product is an instruction of each of its four warps."""
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        m, n, k = map(int, match.groups())
        return m * n * k / TENSOR_MULTIPLY_ADDS / 4
    return {"HMMA.16816": 1.0, "HMMA.1688": 0.5}.get(".".join(name.split(".")[:2]), 0.0)


def _sectors(names: list[str]) -> float:
    """Sectors written to global memory. Stores narrower than 16 bytes, of which a lane makes
    several, are those of neighbours that could not be joined: the lane's values lie together, the
    next lane's behind them, so that each store touches more sectors than it has bytes for.
    """
    sizes = [_bytes_a_lane(name) for name in names if name.startswith("STG")]
    between_lanes = min(sum(sizes), 32)
    return sum(size if size == 16 else between_lanes for size in sizes)
