"""Loss curves of a model on several meshes of 8 CPU devices, beside one device's: a table of differences.

    uv run python -m tests.train.mesh_curves           # every model on every mesh, 20 steps
    uv run python -m tests.train.mesh_curves --small   # the part that the default tests run

Each cell is the largest relative difference of a step's loss, or of the evaluation after the last step. The
exit status is 0 if all are below `TOLERANCE` and no compiled step gathers q, k, v or g.
"""

import argparse
import os
import re
import sys

TOLERANCE = 1e-5
MESHES = {
    "data 8": dict(data=8, fsdp=1),
    "fsdp 8": dict(data=1, fsdp=8),
    "data 2, fsdp 2, tensor 2": dict(data=2, fsdp=2, tensor=2),
    "fsdp 2, context 4": dict(data=1, fsdp=2, context=4),
}
SMALL = {"fsdp 2, context 2, tensor 2": dict(data=1, fsdp=2, context=2, tensor=2)}
# Meshes of a model with experts; their device's tokens are gathered there, as they should.
EXPERT_MESHES = {
    "expert 8": dict(data=1, fsdp=1, expert=8),
    "data 2, expert 2, context 2": dict(data=2, fsdp=1, expert=2, context=2),
    "fsdp 2, expert 2, tensor 2": dict(data=1, fsdp=2, expert=2, tensor=2),
}
MODELS = {
    "DeltaNet": ("delta_net",),
    "Gated DeltaNet": ("gated_delta_net",),
    "KDA": ("kda",),
    "hybrid": ("gated_delta_net", "sliding_window", "kda", "full_attention"),
}


def model_config(pattern, seq_len, layers):
    from deltajax.models import get_preset

    # Two key heads for four value heads, and two key/value heads for four query heads: groups stay together.
    return get_preset("tiny_delta_net").replace(
        num_layers=layers, layer_pattern=pattern[:layers], hidden_size=64, num_heads=2, num_v_heads=4,
        head_dim=16, head_v_dim=16, intermediate_size=96, attn_num_heads=4, attn_num_kv_heads=2,
        attn_head_dim=24, window_size=seq_len // 12,
    )  # fmt: skip


def expert_config(seq_len, layers):
    """Two experts of eight and a shared one for each token; of two layers the first has none."""
    return model_config(("full_attention", "gated_delta_net"), seq_len, layers).replace(
        num_experts=8, experts_per_token=2, expert_intermediate_size=16, num_shared_experts=1,
        num_dense_layers=layers - 1, shared_expert_gate=True, router="sigmoid", router_bias=True,
        attn_qk_norm=True, attn_output_gate=True, attn_rope_fraction=0.5, zero_centered_norm=True,
    )  # fmt: skip


def batches(count, rows, seq_len, vocab):
    """Packed rows: documents of 3 to seq_len / 2 tokens, whose every second token repeats the one before."""
    import numpy as np

    rng = np.random.default_rng(0)
    for _ in range(count):
        ids = np.zeros((rows, seq_len), np.int32)
        for row in ids:
            start, n = 0, 0
            while start < seq_len - 3 and n < 9:
                end, n = min(start + int(rng.integers(3, seq_len // 2)), seq_len), n + 1
                row[start:end] = n
                start = end
            if rng.random() < 0.5:
                row[start - 2 :] = 0  # padding at the end
        tokens = rng.integers(0, vocab, size=(rows, seq_len + 1)).astype(np.int32)
        tokens[:, 2::2] = tokens[:, 0:-2:2]
        yield {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ids}


def curve(config, sizes, steps, rows, seq_len):
    """Losses of the steps, then that of an evaluation, on a mesh of those sizes; and the compiled step."""
    import jax
    import jax.numpy as jnp

    from train.config import OptimizerConfig
    from train.mesh import ShardingRules, global_batch, make_mesh
    from train.model_state import model_state
    from train.optimizer import make_optimizer, make_schedule
    from train.step import make_eval_step, make_train_step

    mesh, rules = make_mesh(**sizes), ShardingRules()
    model = model_state(config, mesh, rules)
    options = OptimizerConfig(warmup_steps=4)
    schedule = make_schedule(options, steps)
    optimizer = make_optimizer(options, schedule, model.logical_axes)
    shardings = jax.tree.map(lambda x: x.sharding, model.abstract_train_state(optimizer))
    step = make_train_step(model.model, optimizer, schedule, shardings, mesh, rules)
    evaluate = make_eval_step(model.model, model.shardings, mesh, rules)
    with jax.set_mesh(mesh):  # as the trainer does
        state = model.init_train_state(optimizer, seed=0)
        ok, losses, compiled = jnp.ones((), bool), [], None
        for batch in batches(steps, rows, seq_len, config.vocab_size):
            batch = global_batch(batch, mesh, rules)
            compiled = compiled or step.lower(state, batch, ok).compile()
            state, metrics = compiled(state, batch, ok)
            ok = metrics.ok
            losses.append(float(metrics.loss))
        total, count = evaluate(state.params, batch)
    return [*losses, float(total) / float(count)], compiled.as_text()


def moved_tokens(text, seq_len, context):
    """Types of the compiled step's gathers and exchanges of arrays with all of a device's or a row's tokens.

    But for the segment ids and, under context parallelism, what full attention swaps: one head of 24 for each
    device.
    """
    found = re.findall(r"= (.*?) (all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    found = [" ".join(x) for x in found if re.search(rf"[\[,]({seq_len}|{seq_len // context})[,\]]", x[0])]
    part = rf"(\w+\[\d+,{seq_len // context},1,24\]\S*,? ?(/\*.*?\*/)?)+"
    allowed = rf"s32\[\d+,{seq_len}\]\S* all-gather|\({part}\) all-to-all"
    return [kind for kind in found if context == 1 or not re.fullmatch(allowed, kind)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="two-layer models, on one mesh of three axes each, 6 steps"
    )
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "experts"], help="these models only")
    options = parser.parse_args()
    small = options.small
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    os.environ |= {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    models = {"hybrid": ("gated_delta_net", "full_attention")} if small else MODELS
    meshes = SMALL if small else MESHES
    steps, rows, seq_len = (6, 8, 40) if small else (20, 8, 88)
    width = max(map(len, MODELS)) + 2
    print("".ljust(width) + " | ".join(meshes), flush=True)
    worst = 0.0
    cases = [
        (name, model_config(pattern, seq_len, layers=max(2, len(pattern))), meshes)
        for name, pattern in models.items()
    ]
    some = list(EXPERT_MESHES)[-1:] if small else list(EXPERT_MESHES)
    cases.append(("experts", expert_config(seq_len, 1 if small else 2), {m: EXPERT_MESHES[m] for m in some}))
    for name, config, on in cases:
        if options.models and name not in options.models:
            continue
        config = config.replace(implementation="scan" if small else None)  # the quickest to compile
        one, _ = curve(config, dict(data=1, fsdp=1), steps, rows, seq_len)
        assert one[-1] < one[0], f"{name} does not learn: {one}"
        cells = []
        for mesh, sizes in on.items():
            many, text = curve(config, sizes, steps, rows, seq_len)
            moved = () if "expert" in sizes else moved_tokens(text, seq_len, sizes.get("context", 1))
            if moved:
                print(f"{name} on {mesh} moves {moved}", flush=True)
                worst = float("inf")
            cells.append(max(abs(a - b) / abs(b) for a, b in zip(many, one, strict=True)))
        found = (f"{x:.1e}".ljust(len(m)) for x, m in zip(cells, on, strict=True))
        print(name.ljust(width) + " | ".join(found) + (f"  ({', '.join(on)})" if name == "experts" else ""))
        worst = max(worst, *cells)
    print(f"largest: {worst:.1e}", flush=True)
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
