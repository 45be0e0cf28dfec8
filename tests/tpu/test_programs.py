"""The compile tests' reader of programs: what it finds, and the one copy that it lets pass."""

import pytest

from tests.tpu.programs import arguments, exchanges, kernels, moves, operations

BLOCK = "bf16[1,64,8,128]"  # 65536 elements
TILED = "{3,2,1,0:T(8,128)(2,1)}"
VMEM = "{3,2,1,0:T(8,128)(2,1)S(1)}"


def program(*lines: str) -> str:
    """A program with one argument %q, another computation with a parameter %inner, and the lines."""
    return "\n".join(
        [
            "HloModule jit_f, is_scheduled=true",
            "",
            "%fused (inner: bf16[1,64,8,128]) -> bf16[1,64,8,128] {",
            f"  %inner = {BLOCK}{TILED} parameter(0)",
            f"  ROOT %negate = {BLOCK}{TILED} negate(%inner)",
            "}",
            "",
            f"ENTRY %main (q: {BLOCK}) -> {BLOCK} {{",
            f"  %q = {BLOCK}{TILED} parameter(0), sharding={{replicated}}",
            f"  %made = {BLOCK}{TILED} fusion(%q), kind=kLoop, calls=%fused",
            *(f"  {line}" for line in lines),
            "}",
            "",
        ]
    )


def copy_start(to: str, source: str = "%q", of: str = BLOCK + TILED) -> str:
    return f"%copy-start = ({to}, {of}, u32[]{{:S(2)}}) copy-start({source}), backend_config={{}}"


def test_operations_kernels_and_exchanges_are_read_as_written():
    text = """
  %copy.1 = bf16[1,8192,32,128]{3,2,1,0:T(8,128)(2,1)} copy(%p)
  ROOT %t = (f32[8,4]{1,0}, u32[]) copy-start(f32[8,4] %x), metadata={op_name="copy(a)"}
  %ag = bf16[64,8]{1,0} all-gather-start(%copy.1), dimensions={0}
  %c = (bf16[2,2]{1,0}) custom-call(%a), custom_call_target="tpu_custom_call", op_name="delta_rule_forward"
"""
    assert [(o, n) for o, n, _ in operations(text)] == [
        ("copy", 8192 * 32 * 128), ("copy-start", 32), ("all-gather-start", 512), ("custom-call", 4)
    ]  # fmt: skip
    assert len(moves(text, 33)) == 1 and len(moves(text, 32)) == 2
    assert len(exchanges(text)) == 1
    assert kernels(text) == {"delta_rule_forward"}


def test_arguments_are_the_parameters_of_the_entry_computation():
    assert arguments(program()) == {"q"}


@pytest.mark.parametrize("source", ("%q", f"{BLOCK}{TILED} %q"))
def test_an_argument_brought_to_vmem_as_it_is_is_no_copy(source):
    assert not moves(program(copy_start(BLOCK + VMEM, source)), 1)


@pytest.mark.parametrize(
    "line",
    [
        copy_start(BLOCK + TILED),
        copy_start(BLOCK + TILED.replace("}", "S(5)}")),
        copy_start(BLOCK + VMEM.replace("3,2,1,0", "3,1,2,0")),
        copy_start(BLOCK + VMEM.replace("T(8,128)(2,1)", "T(8,128)")),
        copy_start("bf16[1,8,64,128]" + VMEM),
        copy_start(BLOCK.replace("bf16", "f32") + VMEM),
        copy_start(BLOCK + VMEM, "%made"),
        copy_start(BLOCK + VMEM, "%inner"),
        copy_start(BLOCK + VMEM, "%copy-done"),
        copy_start(BLOCK + TILED, of=BLOCK + VMEM),
        f"%copy = {BLOCK}{TILED} copy(%q)",
        f"%copy = {BLOCK}{VMEM} copy(%q)",
        f"ROOT %transpose = bf16[1,8,64,128]{TILED} transpose(%q), dimensions={{0,2,1,3}}",
    ],
    ids=[
        *("in HBM", "to host memory", "another order", "another tiling", "another shape", "another type"),
        *("of a result", "of an inner parameter", "of a copy", "out of VMEM"),
        *("copy", "copy to VMEM", "transpose"),
    ],
)
def test_every_other_copy_is_found(line):
    assert len(moves(program(line), 65536)) == 1
    assert not moves(program(line), 65537)
