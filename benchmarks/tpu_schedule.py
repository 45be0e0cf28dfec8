"""Counts what a compiled TPU operation would execute, by replaying its schedule.

libtpu dumps an operation's VLIW bundles after register allocation, with the empty bundles in which the
compiler expects to wait for a result (a matrix product is some 200 bundles away). `Schedule.replay` executes
the scalar unit alone: counters, predicates, branches and the sizes of DMAs, so that grids, loops, ``pl.when``
and blocks that are fetched again or kept are counted as they would run. One bundle is one cycle.

Not seen: waits for DMAs, for the memory itself and for instruction fetch; waits that cross a basic block;
values that come from memory (a branch that depends on one is taken to execute its body; a loop, once).
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

GRANULE = 32  # bytes in one unit of a DMA's size
_WORD = 0xFFFFFFFF
_POINTER = 1 << 40  # addresses are kept above every 32-bit value
_MAX_STEPS = 20_000_000  # scalar instructions of one replay

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+\w*\s*:[\s>]*\{", re.M)
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_INSTRUCTION = re.compile(r"\s*(?:%(\w+) = )?([a-z]\w*)(\S*)(.*)", re.S)
_GUARD = re.compile(r"\((!?)%(\w+)(?:, ([^()]+))?\)")  # (predicate) or (predicate, value where it fails)
_OPERAND = re.compile(
    r"\[smem:(?P<address>\[[^]]*\]|%\w+)\]|%(?P<ssa>\w+)|\[#(?P<memory>[^]]*)\]|(?P<number>-?\d+)"
)
_MEMORY = re.compile(r"allocation(\d+)\w*(?: \+ \$?(\w+))?")


class Constant(NamedTuple):
    value: int


class Instruction(NamedTuple):
    """A scalar instruction; registers are physical ("s17", "p3"), operands registers or constants."""

    bundle: int
    ssa: str  # what it defines, unique
    opcode: str
    kind: str  # the opcode's suffix
    operands: tuple[str | Constant, ...]
    sources: tuple[str, ...]  # SSA names it reads
    guard: tuple[bool, str, str | Constant | None] | None  # (runs if false, predicate, value if not run)


@dataclasses.dataclass
class Counts:
    """Of one run of an operation."""

    issue: int = 0  # bundles that hold instructions, or follow a branch
    cycles: int = 0  # and the empty ones
    hbm_read: int = 0
    hbm_write: int = 0
    matmuls: int = 0  # matrix unit instructions that stream rows
    calls: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    notes: list[str] = dataclasses.field(default_factory=list)


def _signed(x: int) -> int:
    return x - (1 << 32) if x < _POINTER and x >> 31 & 1 else x


def _wrap(x: int) -> int:
    return x & _WORD if x < _POINTER else x


_ARITHMETIC: dict[str, Callable[..., int]] = {
    "smov": lambda x: x,
    "pmov": lambda x: x,
    "int_to_ptr": lambda x: x,
    "sadd": lambda x, y: x + y,
    "ssub": lambda x, y: x - y,
    "smul": lambda x, y: x * y,
    "sand": lambda x, y: x & y,
    "sor": lambda x, y: x | y,
    "sxor": lambda x, y: x ^ y,
    "sshll": lambda x, y: x << (y & 31),
    "sshrl": lambda x, y: x >> (y & 31),
    "sshra": lambda x, y: _signed(x) >> (y & 31),
    "smulhi": lambda x, y: x * y >> 32,
    "smin": min,
    "smax": max,
    "scalar_lea": lambda x, y=0, *_: x + y,
    "pneg": lambda x: not x,
    "pxor": lambda x, y: x != y,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}
# One operand of this value decides the result, even where the other is unknown.
_DECIDED_BY = {"pand": False, "pnand": False, "por": True, "pnor": True}


def _register(ssa: str) -> str:
    return ssa.rpartition("_")[2]


def _address(text: str) -> int | None:
    m = _MEMORY.match(text)
    return m and (int(m[1]) + 1) * _POINTER + int(m[2] or "0", 0)


def _operand(m: re.Match) -> str | Constant:
    inner = m["address"]
    if inner is not None:
        ssa = re.search(r"%(\w+)", inner)
        return _register(ssa[1]) if ssa else Constant(_address(inner[2:]) or 0)
    if m["ssa"]:
        return _register(m["ssa"])
    return Constant(int(m["number"])) if m["number"] else Constant(_address(m["memory"]) or 0)


def _instruction(bundle: int, text: str) -> Instruction | None:
    """The scalar, DMA or call instruction in ``text``, else None."""
    called = re.search(r"inlined_call\b[^/]*/\* (?:%(\S+) = |(\S+))", text)
    core = "= sld" in text and "core id" in text  # of a chip whose two cores are one device: replay the first
    m = _INSTRUCTION.match(_COMMENT.sub("", text))
    if m is None or m[2][0] not in "spdi" or m[2] == "inlined_call_operand":
        return None
    ssa, opcode, kind, rest = m[1] or "", m[2], m[3].removeprefix("."), re.sub(r"\[\w+:\$\w+\]", "", m[4])
    if called:
        return Instruction(bundle, ssa, "call", called[1] or called[2], (), (), None)
    guard = None
    if g := _GUARD.search(rest):
        otherwise = _OPERAND.match(g[3]) if g[3] else None
        guard = (bool(g[1]), _register(g[2]), otherwise and _operand(otherwise))
    sources = tuple(re.findall(r"%(\w+)", rest))
    rest = _GUARD.sub("", rest, count=1)
    if opcode == "sbr":
        target = re.search(r"bundleno = (\d+)", rest)
        if target is None:
            raise ValueError(f"a branch without a target, the dump's format changed: {text}")
        return Instruction(bundle, ssa, "sbr", "", (Constant(int(target[1])),), sources, guard)
    if core:
        return Instruction(bundle, ssa, "smov", "", (Constant(0),), (), None)
    operands = tuple(_operand(o) for o in _OPERAND.finditer(rest))
    if division := re.search(r"/\* (k\w+) ", text) if opcode == "sdivrem" else None:
        kind = division[1]
    return Instruction(bundle, ssa, opcode, kind, operands, sources, guard)


class Schedule:
    """The bundles of one operation (an XLA fusion, a Pallas call, or the program that calls them)."""

    def __init__(self, text: str, delay_slots: int):
        """Args:
        text: a ``packed-bundles-post-ra`` dump.
        delay_slots: bundles that still execute after a branch.
        """
        starts = list(_BUNDLE.finditer(text))
        ends = [m.start() for m in starts[1:]] + [len(text)]
        self.size = len(starts)
        self.delay_slots = delay_slots
        self.spills = self.fills = 0
        self.issues = [False] * self.size
        self.matmuls = [0] * self.size
        scalar: list[Instruction] = []
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if int(start[1], 0) != i:
                raise ValueError(f"bundle {start[1]} where {i:#x} was expected: the dump's format changed")
            body = text[start.end() : end]
            plain = _COMMENT.sub("", body)
            plain = plain[: plain.rindex("}")]
            self.issues[i] |= bool(plain.strip())
            self.spills += len(re.findall(r"= vst\S* \[vmem:\[#allocation\d+_spill", plain))
            self.fills += len(re.findall(r"= vld\S* \[vmem:\[#allocation\d+_spill", plain))
            self.matmuls[i] = len(re.findall(r"= vmatmul", plain))
            found = [_instruction(i, part) for part in body.split(" ;; ")]
            scalar += [x for x in found if x]
            if any(x and x.opcode == "sbr" for x in found):
                last = min(i + delay_slots + 1, self.size)
                self.issues[i + 1 : last] = [True] * (last - i - 1)
        grids = re.findall(r"iteration_bounds: (\(.*?\))", text)  # of every pipelined block
        self.grid_steps = max((math.prod(map(int, re.findall(r"\d+", g))) for g in grids), default=1)
        self.events = self._slice(scalar)

    @staticmethod
    def _slice(scalar: list[Instruction]) -> dict[int, list[Instruction]]:
        """By bundle: branches, DMAs, calls, and whatever they depend on."""
        definitions = collections.defaultdict(list)
        for x in scalar:
            definitions[x.ssa].append(x)
        stores = [x for x in scalar if x.opcode == "sst"]
        transfers = [x for x in scalar if x.opcode == "dma" and not x.kind.startswith("done")]
        todo = transfers + [x for x in scalar if x.opcode in ("sbr", "call")]
        kept: set[Instruction] = set()
        while todo:
            x = todo.pop()
            if x in kept:
                continue
            kept.add(x)
            sources = x.sources
            if x.opcode == "dma":  # its size and predicate; addresses do not matter
                wanted = {*x.operands[1:2], x.guard and x.guard[1]}
                sources = tuple(s for s in sources if _register(s) in wanted)
            todo += [d for s in sources for d in definitions[s]]
            if x.opcode == "sld":
                todo += stores
            if x.opcode == "sdivrem":  # its results leave a queue: the unused ones too
                todo += [pop for pop in scalar if pop.opcode == "spop" and x.ssa in pop.sources]
        events = collections.defaultdict(list)
        for x in scalar:
            if x in kept and x.opcode != "sphi":  # copies within a register
                events[x.bundle].append(x)
        return events

    def replay(self) -> Counts:
        """Executes the scalar unit from the first bundle to the last."""
        core, counts = _Core(), Counts()
        notes: dict[str, set[int]] = collections.defaultdict(set)
        upcoming = [self.size] * (self.size + 1)  # the next bundle with an event
        for i in range(self.size - 1, -1, -1):
            upcoming[i] = i if i in self.events else upcoming[i + 1]
        # Execution runs from `entry` to the last delay slot of a branch taken, then from the branch's target.
        entered = [0] * (self.size + 1)  # how often a run starts here, less how often one ended just before
        last = target = -1
        position = entry = 0
        while True:
            i = upcoming[min(position, self.size)]
            if last >= 0 and i > last:
                entered[entry] += 1
                entered[min(last + 1, self.size)] -= 1
                position = entry = target
                last = -1
                continue
            if i == self.size or core.steps > _MAX_STEPS:
                if i < self.size:
                    notes["too long to replay, stopped"].add(i)
                entered[entry] += 1
                break
            for x in core.execute(self.events[i]):
                runs, values = core.runs(x), core.values(x)
                if x.opcode == "dma":
                    _count_dma(x, values, runs, counts, notes)
                elif runs:
                    last, target = i + self.delay_slots, values[0]
                elif runs is None:
                    notes[
                        "loop of unknown length, run once" if values[0] <= i else "unknown branch, run"
                    ].add(i)
            core.commit()
            position = i + 1
        times = 0
        for i in range(self.size):
            times += entered[i]
            counts.cycles += times
            counts.issue += times * self.issues[i]
            counts.matmuls += times * self.matmuls[i]
            for x in self.events.get(i, ()):
                if x.opcode == "call":
                    counts.calls[x.kind] += times
        counts.notes = [f"{text} ({len(at)}, first at {min(at):#x})" for text, at in sorted(notes.items())]
        return counts


class _Core:
    """Registers and scalar memory; None is an unknown value."""

    def __init__(self):
        self.registers: dict[str, Any] = {}
        self.memory: dict[int, Any] = {}
        self.steps = 0
        self._writes: list[tuple[str, Any]] = []

    def read(self, operand: str | Constant | None) -> Any:
        return operand.value if isinstance(operand, Constant) else self.registers.get(operand or "")

    def values(self, x: Instruction) -> list:
        return [self.read(o) for o in x.operands]

    def runs(self, x: Instruction) -> bool | None:
        if x.guard is None:
            return True
        predicate = self.read(x.guard[1])
        return None if predicate is None else bool(predicate) != x.guard[0]

    def execute(self, bundle: list[Instruction]) -> list[Instruction]:
        """Computes a bundle's results, which `commit` then writes; returns its branches and DMAs."""
        out = []
        for x in bundle:
            self.steps += 1
            runs = self.runs(x)
            if x.opcode in ("sbr", "dma"):
                out.append(x)
            elif x.opcode == "sst":
                address, value = self.values(x)[:2]
                if address is not None and runs is not False:  # spilled values have no pointers to them
                    self.memory[address] = value if runs else None
            elif runs is False and x.guard is not None:
                if x.guard[2] is not None:
                    self._writes.append((_register(x.ssa), self.read(x.guard[2])))
            elif x.opcode == "sdivrem":
                self._writes.append((x.ssa, self._evaluate(x) if runs else None))
            elif x.opcode != "call":
                self._writes.append((_register(x.ssa), self._evaluate(x) if runs else None))
        return out

    def commit(self) -> None:
        self.registers.update(self._writes)
        self._writes.clear()

    def _evaluate(self, x: Instruction) -> Any:
        values = self.values(x)
        if x.opcode == "sld":
            return self.memory.get(values[0])
        if x.opcode in _DECIDED_BY:
            decisive = _DECIDED_BY[x.opcode]
            found = any(v is not None and bool(v) == decisive for v in values)
            if not found and None in values:
                return None
            return (found == decisive) != (x.opcode in ("pnand", "pnor"))
        if x.opcode == "scalar_select":
            return None if values[0] is None else values[1] if values[0] else values[2]
        if x.opcode == "spop":  # of a division
            first, *rest = self.registers.get(x.sources[0]) or (None,)
            self.registers[x.sources[0]] = tuple(rest)
            return first
        if None in values:
            return None
        if x.opcode == "sdivrem":
            quotient_remainder = divmod(values[0], values[1]) if values[1] else (None, None)
            return quotient_remainder[x.kind == "kRem" :]
        if x.opcode == "scmp":
            comparison, kind = x.kind.split(".")[:2]
            return _COMPARE[comparison](*(map(_signed, values) if kind[0] == "s" else values))
        operation = _ARITHMETIC.get(x.opcode)
        if operation is None:
            return None
        if x.opcode in ("smin", "smax") and x.kind == "s32":
            values = [_signed(v) for v in values]
        return _wrap(int(operation(*values)))


def _count_dma(
    x: Instruction, values: list, runs: bool | None, counts: Counts, notes: dict[str, set[int]]
) -> None:
    source, _, target = x.kind.partition("_to_")
    if not target or values[1] is None:
        notes["DMA not counted"].add(x.bundle)
    elif runs is not False:
        counts.hbm_read += values[1] * GRANULE * (source == "hbm")
        counts.hbm_write += values[1] * GRANULE * (target == "hbm")
        if runs is None:
            notes["DMA under unknown predicate, counted"].add(x.bundle)
