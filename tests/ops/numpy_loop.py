"""The recurrence again, in plain NumPy loops over rows, heads and tokens: independent of the library."""

import numpy as np


def delta_rule(case, x: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(o, final_state) of a case in float64."""
    q, k, v, beta = (np.asarray(x[n], np.float64) for n in ("q", "k", "v", "beta"))
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    ids = x.get("segment_ids", np.ones((B, T), int))
    per_segment = case.segments == "states"
    shape = x["dstate"].shape
    scale = K**-0.5 if case.scale is None else case.scale
    initial = np.asarray(x.get("initial_state", np.zeros(shape)), np.float64)
    o, final = np.zeros((B, T, HV, V)), initial.copy()
    for b in range(B):
        for h in range(HV):
            S = np.zeros((K, V)) if per_segment else initial[b, h].copy()
            seen = 0
            for t in range(T):
                n = ids[b, t]
                if n == 0:
                    continue
                if n != seen and per_segment:
                    S = initial[b, n - 1, h].copy()
                elif n != seen and seen != 0:
                    S = np.zeros((K, V))
                seen = n
                qt, kt = q[b, t, h // (HV // H)], k[b, t, h // (HV // H)]
                if case.normalize:
                    qt, kt = (a / np.sqrt(np.sum(a**2) + 1e-6) for a in (qt, kt))
                if case.gate != "none":
                    g = np.asarray(x["g"][b, t, h], np.float64)
                    if "A_log" in x:
                        g = g + (x["dt_bias"][h] if "dt_bias" in x else 0)
                        rate = np.exp(x["A_log"][h])
                        g = (
                            case.lower_bound / (1 + np.exp(-rate * g))
                            if case.decay == "bounded"
                            else -rate * np.logaddexp(0, g)
                        )
                    S = (np.exp(g) if case.gate == "head" else np.exp(g)[:, None]) * S
                S = S + np.outer(kt, beta[b, t, h] * (v[b, t, h] - S.T @ kt))
                o[b, t, h] = scale * (S.T @ qt)
                if per_segment:
                    final[b, n - 1, h] = S
            if not per_segment:
                final[b, h] = S
    return o, final
