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

from tests.bench import nf4_twin as hardware

TYPES = {
    "u16": np.uint16, "b16": np.uint16, "s16": np.int16, "u32": np.uint32, "b32": np.uint32,
    "s32": np.int32, "u64": np.uint64, "b64": np.uint64, "s64": np.int64, "f32": np.float32,
    "pred": np.bool_,
}  # fmt: skip
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
BUFFER = 1 << 32
"""Distance of buffers in the space of addresses: what runs over the end of one is in none."""
SHARED = 1 << 14
"""Bytes of shared memory a program."""
OPERATIONS = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "setp.lt": np.less, "setp.le": np.less_equal, "setp.gt": np.greater,
    "setp.ge": np.greater_equal, "setp.eq": np.equal, "setp.ne": np.not_equal,
}  # fmt: skip
NOTHING = {"bar", "barrier", "membar", "fence", "bra", "ret", "cvta"}


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

    @classmethod
    def parse(cls, ptx: str, name: str) -> Kernel:
        text = re.sub(r"//.*", "", ptx).partition(f".entry {name}(")[2]
        head, _, body = text.partition("{")
        kernel = cls(parameters=re.findall(r"\.param \.\w+ (\w+)", head))
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
            value = np.array(0)  # the name of shared memory
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
        name, target = i.operation[0], i.operands[0]
        if name in ("ld", "st", "atom"):
            return self.access(i)
        if name == "mma":
            return self.mma(i)
        if name in ("mov", "cvt") and i.operation[-1] == "f32" and "bf16x2" in i.operation:
            high, low = (self.read(o, np.float32) for o in i.operands[1:])
            return self.write(target, hardware.bfloat16_pair(low, high))
        if name == "shfl":
            register, _, value = i.operands[0].partition("|")
            lane = self.read(i.operands[2], np.uint32)
            source = np.arange(self.count) // 32 * 32 + lane
            return self.write(register, self.read(i.operands[1], np.uint32)[source])
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
        if name in ("shl", "shr"):
            amount = self.read(i.operands[2], np.uint32).astype(kind)
            return a << amount if name == "shl" else a >> amount
        if name == "prmt":
            return hardware.permute(a, *others)
        if name == "lop3":
            return hardware.lop3(a, *others[:2], int(i.operands[4], 0))
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
        hardware.multiply(sums, w, x)
        for k, name in enumerate(names[0]):
            self.write(name, sums[..., k].ravel())
