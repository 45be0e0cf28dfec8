"""The shared list of delta-rule problems: every implementation answers for every case.

A case is a shape, a gate and a kind of data; `arrays` draws it, `call` runs it through the public ops,
`outputs_and_gradients` differentiates it with random cotangents. A new case is one line of `CASES`.
"""

import dataclasses
import functools
import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from deltajax import ops

SEED = int(os.environ.get("DELTAJAX_TEST_SEED", "0"))  # set it to draw every case anew


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem.

    gate: "none" (DeltaNet), "head" (Gated DeltaNet) or "channel" (KDA).
    decay: what the log decay looks like: "random", "zero", "slow" (about -1e-4), "strong" (about -5),
      "half50" (-50 on half of the tokens), "reset" (-inf on one token); or through the fused activation:
      "softplus" (unbounded, large and small), "bounded" (by ``lower_bound``).
    keys: "random", "identical" (one unit vector for all tokens; its square sums to 1 exactly), "zero".
    segments: "none", "packed" (resets anywhere, padding before, between and behind), "states" (the same
      with num_segments).
    """

    gate: str
    T: int
    K: int = 32
    V: int = 32
    B: int = 1
    H: int = 1
    HV: int = 1
    decay: str = "random"
    keys: str = "random"
    beta_max: float = 1.0
    segments: str = "none"
    normalize: bool = True
    initial: bool = True
    lower_bound: float = -5.0
    scale: float | None = None  # of q; None means K^-1/2
    bias: bool = True  # whether a gate has a dt_bias
    slow_test: bool = False  # only in the long sweep

    def __str__(self):
        shape = f"B{self.B}T{self.T}H{self.H}-{self.HV}K{self.K}V{self.V}"
        extra = [self.keys + "-keys"] if self.keys != "random" else []
        extra += [self.segments] if self.segments != "none" else []
        extra += [f"beta{self.beta_max:g}"] if self.beta_max != 1 else []
        extra += [] if self.initial else ["no-state"]
        extra += [f"bound{self.lower_bound:g}"] if self.lower_bound != -5 else []
        extra += [] if self.scale is None else [f"scale{self.scale:g}"]
        extra += [] if self.bias else ["no-bias"]
        return "-".join([self.gate, shape, self.decay, *extra])


GATES = ("none", "head", "channel")
NUM_SEGMENTS = 6


def _cases() -> list[Case]:
    cases = []
    for gate in GATES:
        # Every length around a chunk's edges, with sizes that are and are not powers of two.
        cases += [
            Case(gate, T=1, K=16, V=16, B=4, H=2, HV=4),
            Case(gate, T=15, K=16, V=32, B=2, beta_max=2.0),
            Case(gate, T=63, K=100, V=64, HV=2),
            Case(gate, T=64, K=64, V=64, initial=False),
            Case(gate, T=65, K=32, V=100, B=2, H=2, HV=4),
            Case(gate, T=130, K=128, V=128, beta_max=2.0),
            Case(gate, T=130, K=256, V=16, normalize=True, slow_test=gate == "none"),
            Case(gate, T=130, K=64, V=256, decay="slow" if gate != "none" else "random"),
            Case(gate, T=1000, K=32, V=32, H=2, HV=2, decay="slow" if gate != "none" else "random"),
            # Keys that stress the inverse.
            Case(gate, T=130, K=64, V=32, keys="identical", beta_max=2.0, decay="zero", normalize=False),
            Case(gate, T=130, keys="zero", decay="slow" if gate != "none" else "random"),
            # Packed rows.
            Case(gate, T=130, B=2, HV=2, segments="packed", decay="slow", V=16),
            Case(gate, T=130, B=2, HV=2, segments="states", decay="slow", K=16),
        ]
    # What a caller may choose.
    cases += [
        Case("none", T=65, HV=2, scale=0.5),
        Case("head", T=65, HV=2, decay="softplus", scale=2.0, bias=False),
        Case("channel", T=65, HV=2, decay="bounded", lower_bound=-1.0, scale=0.5, bias=False),
    ]
    for gate in ("head", "channel"):
        cases += [  # the first four and zero keys are one program
            Case(gate, T=130, decay="zero", beta_max=2.0),
            Case(gate, T=130, decay="strong"),
            Case(gate, T=130, decay="half50", beta_max=2.0),
            Case(gate, T=130, decay="reset"),
            Case(gate, T=1000, K=64, V=64, keys="identical", beta_max=2.0, decay="zero", normalize=False),
            Case(gate, T=130, decay="softplus", H=2, HV=4),
            Case(gate, T=130, decay="bounded", H=2, HV=2),
            Case(gate, T=65, decay="softplus", segments="packed", B=2),
            Case(gate, T=1000, K=128, V=128, decay="half50", slow_test=True),
            Case(gate, T=1000, K=100, V=64, decay="bounded", B=2, H=2, HV=4, slow_test=True),
        ]
    return cases


CASES = _cases()


def segment_rows(B: int, T: int, rng: np.random.Generator) -> np.ndarray:
    """[B, T] ids: padding in front, between and behind, one-token segments, boundaries anywhere."""
    rows = np.zeros((B, T), np.int32)
    for b in range(B):
        cuts = np.sort(rng.choice(np.arange(1, T), size=2 * (NUM_SEGMENTS - 1), replace=False))
        for n in range(NUM_SEGMENTS - 1):  # the last segment stays empty
            start = cuts[2 * n]
            stop = cuts[2 * n + 1] if n % 2 else (cuts[2 * n + 2] if 2 * n + 2 < len(cuts) else T - 1)
            rows[b, start:stop] = n + 1
    return rows


def arrays(case: Case, dtype=np.float64, seed: int = SEED) -> dict[str, np.ndarray]:
    """The case's arrays by argument name, and its cotangents `do` and `dstate`.

    q, k, v, g, beta are rounded to ``dtype``; states and gate parameters are float32 (float64 for float64).
    """
    rng = np.random.default_rng([seed, zlib.crc32(str(case).encode())])
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    B, T, H, HV, K, V = case.B, case.T, case.H, case.HV, case.K, case.V
    q, v = normal(B, T, H, K), normal(B, T, HV, V)
    if case.keys == "identical":  # +-1/sqrt(K), exact for K = 16, 64, 256: the sum of squares is exactly 1
        k = np.broadcast_to(rng.choice([-1.0, 1.0], size=(B, 1, H, K)) * K**-0.5, (B, T, H, K))
        beta = np.full((B, T, HV), case.beta_max)
    else:
        k = normal(B, T, H, K) if case.keys == "random" else np.zeros((B, T, H, K))
        beta = case.beta_max * rng.uniform(size=(B, T, HV))
    if not case.normalize and case.keys == "random":
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    out = {"q": q, "k": k, "v": v, "beta": beta}

    g_shape = (B, T, HV) if case.gate == "head" else (B, T, HV, K)
    if case.gate != "none":
        noise = normal(*g_shape)
        token = rng.uniform(size=(B, T) + (1,) * (len(g_shape) - 2))
        match case.decay:
            case "random":
                g = -np.log1p(np.exp(noise))
            case "zero":
                g = np.zeros(g_shape)
            case "slow":
                g = -1e-4 * np.abs(noise)
            case "strong":
                g = -5 + 0.1 * noise
            case "half50":
                g = np.where(token < 0.5, -50.0, -0.1 * np.abs(noise))
                g[:, 0] = -0.1 * np.abs(
                    noise[:, 0]
                )  # the initial state's gradient is no number below float32's
            case "reset":
                g = -0.01 * np.abs(noise)
                g[:, T // 2] = -np.inf
            case "softplus" | "bounded":
                g = 3 * noise
                out["A_log"] = np.log(rng.uniform(0.05, 16, size=HV))
                if case.bias:
                    out["dt_bias"] = normal(*g_shape[2:]) - 3
        out["g"] = g
    shape = (B, NUM_SEGMENTS, HV, K, V) if case.segments == "states" else (B, HV, K, V)
    if case.initial:
        out["initial_state"] = normal(*shape)
    out["do"], out["dstate"] = normal(B, T, HV, V), normal(*shape)
    wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    half = {"q", "k", "v", "g", "beta"}
    out = {name: x.astype(dtype if name in half else wide) for name, x in out.items()}
    if case.segments != "none":
        out["segment_ids"] = segment_rows(B, T, rng)
    return out


def call(case: Case, x: dict, implementation: str, chunk_size: int | None = None, **options):
    """(o, final_state) of the case through the public ops; ``options`` go to the op."""
    options |= dict(
        scale=case.scale,
        normalize_qk=case.normalize,
        initial_state=x.get("initial_state"),
        segment_ids=x.get("segment_ids"),
        num_segments=NUM_SEGMENTS if case.segments == "states" else None,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    if case.gate == "none":
        return ops.delta_rule(x["q"], x["k"], x["v"], x["beta"], **options)
    gate = None
    if "A_log" in x:
        bound = case.lower_bound if case.decay == "bounded" else None
        gate = ops.Gate(x["A_log"], x.get("dt_bias"), lower_bound=bound)
    op = ops.gated_delta_rule if case.gate == "head" else ops.kimi_delta_attention
    return op(x["q"], x["k"], x["v"], x["g"], x["beta"], gate=gate, **options)


NOT_DIFFERENTIATED = ("do", "dstate", "segment_ids")


def program(case: Case) -> Case:
    """The case less what only its arrays tell: equal for cases that are compiled once for all."""
    decay = case.decay if case.decay in ("softplus", "bounded") else "random"
    return dataclasses.replace(case, decay=decay, keys="random", beta_max=1.0, slow_test=False)


def outputs_and_gradients(case: Case, x: dict, implementation: str, chunk_size: int | None = None) -> dict:
    """o, final_state and the gradient of <o, do> + <final_state, dstate> in every float argument."""
    return compiled(program(case), x, implementation, chunk_size)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def compiled(case: Case, x: dict, implementation: str, chunk_size: int | None) -> dict:
    """`outputs_and_gradients` of every case of one program."""
    return with_gradients(lambda x: call(case, x, implementation, chunk_size), x)


def with_gradients(op, x: dict) -> dict:
    """`outputs_and_gradients` of op: x -> (o, final_state)."""
    floats = {name: a for name, a in x.items() if name not in NOT_DIFFERENTIATED}
    (o, state), pull = jax.vjp(lambda floats: op({**x, **floats}), floats)
    (grads,) = pull((x["do"].astype(o.dtype), x["dstate"].astype(state.dtype)))
    return {"o": o, "final_state": state, **{f"d{name}": g for name, g in grads.items()}}


def reference(case: Case, x: dict) -> dict[str, np.ndarray]:
    """`outputs_and_gradients` of the recurrence in float64, as NumPy arrays."""
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(a if n == "segment_ids" else np.asarray(a, np.float64)) for n, a in x.items()}
        return jax.device_get(outputs_and_gradients(case, wide, "scan"))


def relative_error(x, reference) -> float:
    """|x - reference| / |reference| over the whole array; |x| where the reference is zero. NaN stays NaN."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    norm = np.linalg.norm(reference)
    return float(np.linalg.norm(x - reference) / (norm if norm else 1.0))
