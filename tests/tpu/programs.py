"""What the compile tests ask of a compiled program's text: its kernels, copies and exchanges."""

import math
import re

# A result's shapes and the operation that makes it.
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<type>\(.*?\)|\S+) (?P<operation>[\w\-]+)\(")
# To VMEM (S(1)), laid out as before: one shape, but for the memory space.
TO_VMEM = re.compile(
    r"= \((?P<shape>\w+\[[\d,]+\]\{[^{}]*)S\(1\)\}, (?P=shape)\}, \S+ "
    r"copy-start\((?:\S+ )?%?(?P<source>[\w.\-]+)\)"
)
ARGUMENT = re.compile(r"^\s*%?(?P<name>[\w.\-]+) = \S+ parameter\(\d+\)")
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


def operations(text: str) -> list[tuple[str, int, str]]:
    """(operation, elements of its largest result, line) of every instruction, inside fusions too."""
    out = []
    for line in text.splitlines():
        found = INSTRUCTION.match(line)
        if found:
            sizes = [
                math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", found["type"])
            ]
            out.append((found["operation"], max(sizes, default=1), line.strip()[:1500]))
    return out


def kernels(text: str) -> set[str]:
    """Names of the ops' Pallas kernels that a program calls."""
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    ours = ("delta_rule_forward", "delta_rule_backward")
    return {name for name in ours for line in calls if name in line}


def arguments(text: str) -> set[str]:
    """Names of the program's own parameters: those of the computation marked ENTRY."""
    _, _, entry = text.partition("\nENTRY ")
    lines = entry.partition("\n}")[0].splitlines()
    return {found["name"] for line in lines if (found := ARGUMENT.match(line))}


def moves(text: str, elements: int) -> list[str]:
    """Copies and transposes of at least so many elements.

    Not a prefetch: an argument of the program brought to VMEM as it is. That is a kernel's one read of its
    operand, started early by XLA.
    """
    given = arguments(text)

    def prefetch(line: str) -> bool:
        found = TO_VMEM.search(line)
        return found is not None and found["source"] in given

    moving = ("copy", "copy-start", "transpose")
    return [
        line
        for operation, size, line in operations(text)
        if operation in moving and size >= elements and not prefetch(line)
    ]


def exchanges(text: str) -> list[str]:
    """Collectives but for sums."""
    return [
        line for operation, _, line in operations(text) if operation.removesuffix("-start") in COLLECTIVES
    ]
