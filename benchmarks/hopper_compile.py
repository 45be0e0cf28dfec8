"""Compiles the Hopper kernels for a real H100 on a machine without one: registers, spills, ptxas' complaints.

    uv run --with jax-cuda13-pjrt==0.11.2 --with nvidia-cuda-nvcc --with nvidia-nvvm \\
        python -m benchmarks.hopper_compile

The compiler inside JAX's CUDA plugin asks the driver which card there is and nothing else; a stand-in of
libcuda, built here with cc, answers for an H100. Nothing runs: see `benchmarks.hopper` for that.

The last column names the code that the compiler got, less the lines it came from: it stays the same when a
change only moves code.
"""

import ctypes
import dataclasses
import hashlib
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

STAND_IN = r"""
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = 0; return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) {
  *v = a == 75 ? 9 : a == 76 ? 0 : a == 16 ? 132 : a == 97 ? 232448 : a == 81 ? 233472 : 1;
  return 0;
}
int cuGetErrorName(int e, const char **s) { *s = "none"; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "none"; return 0; }
"""

MOST_SPILLED = 512  # bytes a thread


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    gate: tuple[str, ...] = ("none", "head", "channel")
    """Gate kinds."""
    sizes: tuple[tuple[int, int], ...] = ((128, 128), (64, 64), (256, 256))
    """K, V of each."""
    T: int = 4096
    """Tokens; sequences as long as that are walked in runs where there are few heads, as here."""
    check: bool = False
    """Fail where a kernel spills more than a few registers or its products are serialised."""


def modules(gate: str, K: int, V: int, T: int, *, backward: bool) -> list[bytes]:
    """Every kernel of the op's forward pass alone, or of both passes, as the compiler gets it."""
    import jax
    import jax.numpy as jnp

    from deltajax.ops import dispatch
    from tests import cases

    dispatch.PALLAS = {"cuda": dispatch.PALLAS["cuda"]}
    decay = {"none": "random", "head": "softplus", "channel": "bounded"}[gate]
    case = cases.Case(gate, T=T, K=K, V=V, B=2, HV=2, decay=decay)
    arrays = cases.arrays(case, jnp.dtype(jnp.bfloat16))
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    run = cases.outputs_and_gradients if backward else cases.call
    return lowered(jax.jit(lambda x: run(case, x, "pallas")).trace(x))


def step_modules(gate: str, K: int, V: int) -> list[bytes]:
    """The step's kernel."""
    import jax

    from deltajax.ops import step_kernels
    from tests.ops import step_cases

    step_kernels.STEP_KERNELS = {"cuda": step_kernels.STEP_KERNELS["cuda"]}
    decay = {"none": "random", "head": "softplus", "channel": "bounded"}[gate]
    case = step_cases.StepCase(gate, K=K, V=V, B=256, HV=1, decay=decay)
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), step_cases.arrays(case))
    return lowered(jax.jit(lambda x: step_cases.call(case, x, "pallas")).trace(x))


def latent_modules() -> list[bytes]:
    """Decoding's attention to latents, at Kimi Linear's sizes."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.gpu import latent_decode

    q = jax.ShapeDtypeStruct((28, 32, 576), jnp.bfloat16)
    latent = jax.ShapeDtypeStruct((28, 2**20, 576), jnp.bfloat16)
    length = jax.ShapeDtypeStruct((28,), jnp.int32)
    return lowered(jax.jit(lambda *x: latent_decode.attend(*x, rank=512, scale=0.1)).trace(q, latent, length))


def expert_modules() -> list[bytes]:
    """A mixture's experts, forward and backward, at Kimi Linear's sizes."""
    import jax
    import jax.numpy as jnp

    from benchmarks import hopper_experts as experts
    from deltajax.layers import expert_rows

    expert_rows.KERNEL_ROWS = {"cuda": expert_rows.Blocks}
    D, F, E, T, J = 2304, 1024, 64, 8192, 8
    x = jax.ShapeDtypeStruct((1, T, D), jnp.bfloat16)
    choice = jax.ShapeDtypeStruct((1, T, J), jnp.int32)
    weight = jax.ShapeDtypeStruct((1, T, J), jnp.float32)
    kernels = tuple(jax.ShapeDtypeStruct((E, *s), jnp.bfloat16) for s in ((D, F), (D, F), (F, D)))
    run = experts.layer("pallas", D, F, E, jnp.bfloat16)
    return lowered(jax.jit(lambda *args: experts.both(run, *args)).trace(x, choice, weight, kernels, x))


def lowered(traced) -> list[bytes]:
    """The kernels of a traced program."""
    program = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    return [
        op.attributes["mhlo.backend_config"]["module"].value_bytes for op in custom_calls(program.operation)
    ]


def custom_calls(operation):
    """The Mosaic kernels below an MLIR operation."""
    for region in operation.regions:
        for block in region:
            for op in block:
                if op.operation.name == "stablehlo.custom_call" and "mhlo.backend_config" in op.attributes:
                    yield op
                yield from custom_calls(op.operation)


def compiler(folder: str):
    """The plugin's compile function."""
    source = Path(folder, "cuda.c")
    source.write_text(STAND_IN)
    stand_in = Path(folder, "libcuda.so.1")
    command = ["cc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(stand_in), str(source)]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(stand_in), mode=ctypes.RTLD_GLOBAL)
    plugin = importlib.util.find_spec("jax_plugins.xla_cuda13")
    if plugin is None or plugin.origin is None:
        raise SystemExit("needs jax-cuda13-pjrt, nvidia-cuda-nvcc and nvidia-nvvm: see --help")
    function = ctypes.CDLL(str(Path(plugin.origin).with_name("xla_cuda_plugin.so"))).MosaicGpuCompile
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    for place in sys.path:
        if Path(place, "nvidia/cu13/bin/ptxas").exists():
            os.environ["PATH"] = f"{Path(place, 'nvidia/cu13/bin')}:{os.environ['PATH']}"
    return function


def said(function, module: bytes) -> str:
    """What ptxas says of a module. Its loading fails afterwards, for want of a driver."""
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(1), os.dup(2)]
        for target in (1, 2):
            os.dup2(file.fileno(), target)
        try:
            function(module, len(module))
        finally:
            for target, fd in zip((1, 2), kept, strict=True):
                os.dup2(fd, target)
                os.close(fd)
        file.seek(0)
        return file.read().decode(errors="replace")


def code_of(module: bytes) -> str:
    """A name for a kernel's code without what it says of the lines of Python that it came from."""
    from jax._src.interpreters import mlir
    from jax._src.lib import mosaic_gpu_dialect
    from jaxlib.mlir import ir

    with mlir.make_ir_context() as context:
        mosaic_gpu_dialect.register_dialect(context)
        context.load_all_available_dialects()
        context.allow_unregistered_dialects = True
        text = ir.Module.parse(module).operation.get_asm(enable_debug_info=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def main(options: Options) -> int:
    """Prints a line for each kernel."""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        function = compiler(folder)
        made = []
        for gate, (K, V) in itertools.product(options.gate, options.sizes):
            size = f"{gate:8s} {K:3d} x {V:3d}"
            made.append((f"{size} forward", modules(gate, K, V, options.T, backward=False)))
            made.append((size, modules(gate, K, V, options.T, backward=True) + step_modules(gate, K, V)))
        made += [("latents", latent_modules()), ("experts", expert_modules())]
        for what, module in ((what, x) for what, found in made for x in found):
            text = said(function, module)
            name = re.search(r"Compiling entry function '(\w+?)_mosaic_gpu_kernel'", text)
            found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+)", text)
            if not name or not found:
                print(f"{what}: did not compile\n{text}")
                bad += 1
                continue
            stores, loads, registers = map(int, found.groups())
            serialised = "serialized" in text
            bad += stores > MOST_SPILLED or serialised
            print(
                f"{what:26s}  {name[1]:20s} {registers} registers, spilled {stores} / {loads} B"
                + ", products serialised" * serialised
                + f"  {code_of(module)}",
                flush=True,
            )
    return int(options.check and bad > 0)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
