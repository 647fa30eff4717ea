"""Runs a kernel's PTX, as a compiler made it from CUDA, on numpy arrays: many threads at once.

Programs of one y of the grid run together, those of different y one after another, shuffled. A
register is an array of a cell a thread. At each step the threads that are furthest behind take
their next instruction together, which brings diverged threads together again. An instruction that
is not written here raises NotImplementedError. Meaning of the instructions: NVIDIA's PTX ISA.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Registers = NDArray[np.uint32]
Floats = NDArray[np.float32]
LANES = np.arange(32)
G, T = LANES >> 2, LANES & 3

TYPES = {
    "u8": np.uint8, "u16": np.uint16, "b16": np.uint16, "s16": np.int16, "u32": np.uint32,
    "b32": np.uint32, "s32": np.int32, "u64": np.uint64, "b64": np.uint64, "s64": np.int64,
    "f32": np.float32, "pred": np.bool_,
}  # fmt: skip
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
BUFFER = 1 << 32
"""Distance of buffers in the space of addresses: what runs over the end of one is in none."""
SHARED = 1 << 17
"""Bytes of shared memory a program."""
DYNAMIC = 1 << 10
"""Where in it the memory lies whose size the launch gives, behind what the source declares."""
OPERATIONS = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "setp.lt": np.less, "setp.le": np.less_equal, "setp.gt": np.greater,
    "setp.ge": np.greater_equal, "setp.eq": np.equal, "setp.ne": np.not_equal,
}  # fmt: skip
NOTHING = {"bar", "barrier", "membar", "fence", "bra", "ret", "cvta", "prefetch"}
"""A barrier is nothing to do where the threads that are furthest behind go first."""


def permute(a: Registers, b: Registers, selector: Registers | int) -> Registers:
    """prmt.b32: digit i of the selector picks byte i of the result among those of a, 0 to 3, and
    of b, 4 to 7; with the digit's top bit set, that byte's sign eight times.
    """
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    selector = np.asarray(selector, np.uint64)
    result = np.zeros(both.shape, np.uint64)
    for i in range(4):
        digit = selector >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (digit & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        if (digit & np.uint64(8)).any():
            byte = np.where(digit & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(0xFF), byte)
        result |= byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def lop3(a: Registers, b: Registers, c: Registers, truth: int) -> Registers:
    """lop3.b32: bit 4a + 2b + c of the truth table, for each bit."""
    result = np.zeros_like(a)
    for case in range(8):
        if truth >> case & 1:
            terms = [x if case >> i & 1 else ~x for x, i in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def bfloat16_bits(values: Floats) -> Registers:
    """Rounded to nearest, ties to even; NaN is 0x7FFF."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & 1)) >> np.uint64(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint32)


def bfloat16_pair(low: Floats, high: Floats) -> Registers:
    """cvt.rn.bf16x2.f32 %0, high, low."""
    return bfloat16_bits(low) | bfloat16_bits(high) << np.uint32(16)


def values_of_pair(pair: Registers) -> list[NDArray[np.float64]]:
    """The two bfloat16 of a register, the lower first."""
    halves = ((pair & 0xFFFF) << np.uint32(16), pair & np.uint32(0xFFFF0000))
    return [np.ascontiguousarray(half).view(np.float32).astype(np.float64) for half in halves]


def multiply(sums: Floats, w: list[Registers], x: list[Registers]) -> None:
    """mma.sync.m16n8k16 of each warp: sums (warps, 32, 4) += A B, rounded to float32.

    A's register j holds row g + 8 (j % 2), columns 2t and 2t + 1 + 8 (j // 2); B's register j rows
    2t and 2t + 1 + 8j, column g; the sums' number i row g + 8 (i // 2), column 2t + i % 2.
    """
    a, b = np.empty((len(sums), 16, 16)), np.empty((len(sums), 16, 8))
    for j in range(4):
        for i, value in enumerate(values_of_pair(w[j])):
            a[:, G + 8 * (j % 2), 2 * T + i + 8 * (j // 2)] = value
    for j in range(2):
        for i, value in enumerate(values_of_pair(x[j])):
            b[:, 2 * T + i + 8 * j, G] = value
    product = a @ b
    for i in range(4):
        sums[:, :, i] = sums[:, :, i] + product[:, G + 8 * (i // 2), 2 * T + i % 2]


@dataclass
class Instruction:
    """`@guard operation operands`."""

    guard: str
    operation: list[str]
    operands: list[str]

    @property
    def type(self) -> type:
        return TYPES[self.operation[-1]]


@dataclass
class Kernel:
    """Instructions, where labels are, the names of the parameters."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    dynamic: str = ""
    """The name of shared memory whose size the launch gives."""

    @classmethod
    def parse(cls, ptx: str, name: str) -> Kernel:
        text = re.sub(r"//.*", "", ptx).partition(f".entry {name}(")[2]
        head, _, body = text.partition("{")
        dynamic = re.search(r"\.extern \.shared .* (\w+)\[\]", ptx)
        kernel = cls(
            parameters=re.findall(r"\.param \.\w+ (\w+)", head),
            dynamic=dynamic.group(1) if dynamic else "",
        )
        body = re.split(r"\n}", body)[0]
        for statement in re.split(r";|(?<=:)\n", re.sub(r"(\$\w+:)", r"\1\n", body)):
            statement = statement.strip()
            if re.fullmatch(r"\$\w+:", statement):
                kernel.labels[statement[:-1]] = len(kernel.instructions)
            elif statement and not statement.startswith("."):
                guard, operation, operands = re.fullmatch(
                    r"(?:@(\S+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL
                ).groups()
                operation = operation.replace("::", "_").split(".")
                parts = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", operands)
                kernel.instructions.append(Instruction(guard or "", operation, parts))
        return kernel


class Machine:
    """A launch of one kernel."""

    def __init__(self, kernel: Kernel, grid, block, args, arrivals: np.random.Generator) -> None:
        self.kernel, self.arrivals = kernel, arrivals
        self.buffers = [np.ascontiguousarray(a) for a in args if isinstance(a, np.ndarray)]
        addresses = iter(range(BUFFER, BUFFER * (len(self.buffers) + 1), BUFFER))
        values = [next(addresses) if isinstance(a, np.ndarray) else a for a in args]
        self.parameters = dict(zip(kernel.parameters, values, strict=True))
        self.grid, self.block = grid, block

    def start(self, y: int) -> None:
        """Bring in the threads of the programs (…, y)."""
        x, thread = np.indices((self.grid[0], self.block[0])).reshape(2, -1)
        self.size, self.program = len(thread), x
        self.special = {"%tid.x": thread, "%ctaid.x": x, "%ctaid.y": y, "%ntid.x": self.block[0],
                        "%nctaid.x": self.grid[0], "%nctaid.y": self.grid[1]}  # fmt: skip
        self.shared = np.zeros((self.grid[0], SHARED), np.uint8)
        self.registers: dict[str, np.ndarray] = {}
        self.next = np.zeros(self.size, np.int64)
        self.threads = slice(None)

    def run(self) -> None:
        end = len(self.kernel.instructions)
        for y in self.arrivals.permutation(self.grid[1]):
            self.start(int(y))
            with np.errstate(over="ignore", invalid="ignore"):
                while (at := int(self.next.min())) < end:
                    self.step(at, self.next == at, end)

    def step(self, at: int, here: np.ndarray, end: int) -> None:
        instruction = self.kernel.instructions[at]
        self.next[here] = at + 1
        if instruction.guard:
            holds = self.registers[instruction.guard.lstrip("!")]
            here = here & (~holds if instruction.guard.startswith("!") else holds)
        if not here.any():
            return
        name = instruction.operation[0]
        self.threads = slice(None) if here.all() else np.flatnonzero(here)
        if name == "bra":
            self.next[here] = self.kernel.labels[instruction.operands[0]]
        elif name == "ret":
            self.next[here] = end
        elif name == "cvta":
            self.write(instruction.operands[0], self.read(instruction.operands[1], np.uint64))
        elif name not in NOTHING:
            self.execute(instruction)

    def read(self, operand: str, kind: type) -> np.ndarray:
        """The operand in the threads that take part, seen as `kind`."""
        if operand.startswith("%") and operand not in self.special:
            value = self.registers[operand][self.threads]
            if kind is np.bool_ or value.dtype == kind:
                return value
            if value.itemsize != np.dtype(kind).itemsize:
                return value.astype(kind)
            return value.view(kind)
        if operand in self.special:
            value = np.broadcast_to(self.special[operand], self.size)[self.threads]
        elif operand.startswith("0f"):
            value = np.array(int(operand[2:], 16), np.uint32).view(np.float32)
        elif re.fullmatch(r"-?(0x)?[0-9A-Fa-f]+U?", operand):
            value = np.array(int(operand.rstrip("U"), 0))
        else:
            value = np.array(DYNAMIC if operand == self.kernel.dynamic else 0)
        return np.broadcast_to(value.astype(kind), self.count)

    @property
    def count(self) -> int:
        return self.size if isinstance(self.threads, slice) else len(self.threads)

    def write(self, register: str, value: np.ndarray) -> None:
        old = self.registers.get(register)
        if old is None or old.dtype != value.dtype:
            raw = np.zeros(self.size, value.dtype)
            if old is not None and old.itemsize == value.itemsize:
                raw = old.view(value.dtype)
            self.registers[register] = old = raw
        old[self.threads] = value

    def execute(self, i: Instruction) -> None:
        name = i.operation[0]
        if name == "cp":
            return self.copy(i) if "shared" in i.operation else None
        target = i.operands[0]
        if name in ("ld", "st", "atom"):
            return self.access(i)
        if name == "mma":
            return self.mma(i)
        if name in ("mov", "cvt") and i.operation[-1] == "f32" and "bf16x2" in i.operation:
            high, low = (self.read(o, np.float32) for o in i.operands[1:])
            return self.write(target, bfloat16_pair(low, high))
        if name == "shfl":
            register, _, value = i.operands[0].partition("|")
            # Bits of a lane's number that stay its own.
            segment = int(self.read(i.operands[3], np.uint32)[0]) >> 8 & 31
            thread, lane = np.arange(self.count), self.read(i.operands[2], np.int32)
            source = (thread & ~31 | thread & segment) + (lane & 31 & ~segment)
            value = self.read(i.operands[1], np.uint32)[source]
            return self.write(register, value.view(i.type if i.type is np.float32 else np.uint32))
        self.write(target, self.arithmetic(i))
        return None

    def arithmetic(self, i: Instruction) -> np.ndarray:
        name, kind = i.operation[0], i.type
        if name == "selp":
            picked = self.read(i.operands[3], np.bool_)
            return np.where(picked, *(self.read(o, kind) for o in i.operands[1:3]))
        if name == "mov":
            return self.read(i.operands[1], kind)
        if name == "cvt":
            return self.read(i.operands[1], kind).astype(TYPES[i.operation[-2]])
        a, *others = (self.read(o, kind) for o in i.operands[1:])
        if name == "not":
            return ~a
        if name == "neg":
            return -a
        if name in ("shl", "shr"):
            amount = self.read(i.operands[2], np.uint32).astype(kind)
            return a << amount if name == "shl" else a >> amount
        if name == "fma":
            return (a.astype(np.float64) * others[0] + others[1]).astype(np.float32)
        if name == "div":
            return a / others[0] if kind is np.float32 else a // others[0]
        if name == "ex2":
            return np.exp2(a)
        if name == "prmt":
            return permute(a, *others)
        if name == "lop3":
            return lop3(a, *others[:2], int(i.operands[4], 0))
        if name == "bfi":
            start, width = int(i.operands[3]), int(i.operands[4])
            mask = np.uint32(((1 << width) - 1) << start & 0xFFFFFFFF)
            return (a << np.uint32(start)) & mask | others[0] & ~mask
        if name in ("mul", "mad"):
            if i.operation[1] == "wide":
                wide = {np.uint32: np.uint64, np.int32: np.int64}[kind]
                a, others[0] = a.astype(wide), others[0].astype(wide)
                others[1:] = [self.read(o, wide) for o in i.operands[3:]]
            product = a * others[0]
            return product + others[1] if name == "mad" else product
        operation = f"setp.{i.operation[1]}" if name == "setp" else name
        if operation not in OPERATIONS or (name == "setp" and len(i.operation) > 3):
            raise NotImplementedError(".".join(i.operation))
        return OPERATIONS[operation](a, others[0])

    def access(self, i: Instruction) -> None:
        """ld, st or atom.add; addresses lie within one buffer."""
        is_store, is_vector = i.operation[0] == "st", "v4" in i.operation
        place, value = i.operands[:2] if is_store else i.operands[1::-1]
        if "param" in i.operation:
            number = self.parameters[place.strip("[]")]
            return self.write(value, np.full(self.count, number, i.type))
        registers = re.findall(r"[%\w.]+", value) if is_vector else [value]
        base, _, offset = place.strip("[]").replace(" ", "").partition("+")
        is_shared = "shared" in i.operation
        address = self.read(base, np.uint32 if is_shared else np.uint64).astype(np.int64)
        address = address + int(offset or 0)
        size = np.dtype(i.type).itemsize
        assert not (address % (size * len(registers))).any(), "not aligned"
        if is_shared:
            memory = self.shared.reshape(-1)
            address = address + self.program[self.threads] * self.shared.shape[1]
        else:
            buffers = np.unique(address // BUFFER)
            assert len(buffers) == 1 and buffers[0] > 0, "addresses in no buffer"
            memory, address = self.buffers[int(buffers[0]) - 1].reshape(-1), address % BUFFER
        cells = memory.view(BITS[size])
        for k, register in enumerate(registers):
            index = address // size + k
            if i.operation[0] == "atom":
                self.write(register, self.atomic_add(cells, index, i.operands[2]))
            elif is_store:
                cells[index] = self.read(register, BITS[size])
            else:
                self.write(register, cells[index].view(i.type))
        return None

    def copy(self, i: Instruction) -> None:
        """cp.async of 16 bytes to shared memory, or of zeros; done at once."""
        target = self.read(i.operands[0].strip("[]"), np.uint32).astype(np.int64)
        source = self.read(i.operands[1].strip("[]"), np.uint64).astype(np.int64)
        size = self.read(i.operands[3], np.uint32)
        assert not (target % 16).any() and not (source % 16).any(), "not aligned"
        assert np.isin(size, (0, 16)).all()
        values = np.zeros((self.count, 4), np.uint32)
        for buffer in np.unique(source[size > 0] // BUFFER):
            own = (source // BUFFER == buffer) & (size > 0)
            cells = self.buffers[int(buffer) - 1].reshape(-1).view(np.uint32)
            values[own] = cells[source[own, None] % BUFFER // 4 + np.arange(4)]
        target = target + self.program[self.threads] * self.shared.shape[1]
        self.shared.reshape(-1).view(np.uint32)[target[:, None] // 4 + np.arange(4)] = values

    def atomic_add(self, cells: np.ndarray, index: np.ndarray, operand: str) -> np.ndarray:
        value, old = self.read(operand, np.uint32), np.zeros(self.count, np.uint32)
        for k in range(self.count):
            old[k] = cells[index[k]]
            cells[index[k]] += value[k]
        return old

    def mma(self, i: Instruction) -> None:
        names = [re.findall(r"%\w+", operand) for operand in i.operands]
        assert not self.count % 32, "a whole warp takes part"
        w, x = ([self.read(n, np.uint32).reshape(-1, 32) for n in names[k]] for k in (1, 2))
        sums = np.stack([self.read(n, np.float32).reshape(-1, 32) for n in names[3]], -1)
        multiply(sums, w, x)
        for k, name in enumerate(names[0]):
            self.write(name, sums[..., k].ravel())
