"""What a compiled program's text (HLO, after partitioning) says about it: collectives and Pallas kernels."""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}  # others have 4

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<operation>[\w\-]+)\((?P<operands>[^)]*)"
)
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
# The last are XLA's own, for the products of sorted rows with experts, and what they prepare.
_KERNEL = re.compile(
    r'kernel_name\W+(\w+)|op_name="[^"]*?(delta_(?:rule_\w+|step))|'
    r'op_name="[^"]*?(ragged-dot(?:-metadata)?)'
)


@dataclass(frozen=True)
class Traffic:
    """One kind of collective.

    Attributes:
        count: executions in a run of the program, loops included.
        bytes: of the larger of operands and results on one device, over all executions.
    """

    count: int
    bytes: int


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    operation: str
    operands: str
    line: str


def collectives(text: str) -> dict[str, Traffic]:
    """The program's collectives by kind (those of `COLLECTIVES` that occur).

    A loop's body counts as often as its condition lets it run. A TPU spreads one collective over several
    fusions, which counts once; what it fuses from an all-reduce and a slice is a reduce-scatter.
    """
    computations, entry = _parse(text)
    times = _executions(computations, entry)
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    spread: dict[tuple[str, str], tuple[int, int]] = {}
    for name, instructions in computations.items():
        types = {x.name: x.type for x in instructions}
        for x in instructions:
            kind = x.operation.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            operands = re.findall(r"%([\w.\-]+)", x.operands)
            n = max(_bytes(x.type), sum(_bytes(types.get(operand, "")) for operand in operands))
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            elif (channel := _CHANNEL.search(x.line)) and re.match(r"fused_|async_", name):
                key = kind, channel[1]
                spread[key] = max(spread.get(key, (0, 0)), (times[name], n))
                continue
            count[kind] += times[name]
            size[kind] += times[name] * n
    for (kind, _), (runs, n) in spread.items():
        count[kind] += runs
        size[kind] += runs * n
    return {kind: Traffic(count[kind], size[kind]) for kind in COLLECTIVES if count[kind]}


def kernels(text: str) -> dict[str, int]:
    """Pallas kernels of a TPU program -> how often each runs, loops included."""
    computations, entry = _parse(text)
    times = _executions(computations, entry)
    found: Counter[str] = Counter()
    for name, instructions in computations.items():
        for x in instructions:
            if x.operation == "custom-call" and "tpu_custom_call" in x.line:
                kernel = _KERNEL.search(x.line)
                found[next(filter(None, kernel.groups())) if kernel else "other"] += times[name]
    return dict(found)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Computation -> its instructions; and which of them is the entry."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(**found.groupdict(), line=line))
    return computations, entry


def _executions(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, int]:
    """Computation -> how often it runs when the program runs once."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, runs: int) -> None:
        times[name] += runs
        for x in computations.get(name, ()):
            trips = _trips(x, computations) if x.operation == "while" else 1
            for called in _CALLED.findall(x.line):
                for callee in re.findall(r"[\w.\-]+", called):
                    visit(callee, runs * trips)

    visit(entry, 1)
    return times


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    """Iterations of a loop that counts from 0 by 1, as JAX's scans do; 1 where that is not to be read."""
    if known := _KNOWN_TRIPS.search(loop.line):
        return int(known[1])
    condition = _CONDITION.search(loop.line)
    instructions = computations.get(condition[1], []) if condition else []
    constants = {x.name: x.operands for x in instructions if x.operation == "constant"}
    for x in instructions:
        if x.operation == "compare" and "direction=LT" in x.line:
            limit = constants.get(x.operands.split("%")[-1].strip(), "")
            return int(limit) if limit.isdigit() else 1
    return 1


def _bytes(type_: str) -> int:
    """Of the largest array of a type: an asynchronous start names its operand beside its result."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", type_)
    return max(
        (_BYTES.get(t, 4) * math.prod(map(int, filter(None, d.split(",")))) for t, d in arrays), default=0
    )
