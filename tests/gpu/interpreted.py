"""Stand-ins with which the Hopper kernels run in the GPU interpreter, and what a public op calls them with.

The interpreter knows no wgmma with registers on its left and no inline code, so matrix products and rows
gathered from shared memory are replaced by their meaning.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from deltajax.ops import dispatch
from pallas_kernels.gpu import rowwise, tiles
from tests import cases


def value(x):
    x = x() if callable(x) else x
    x = x if isinstance(x, jax.Array) else x[...]
    return x.astype(jnp.float32)


def add_up(pairs):
    return sum(jnp.dot(value(a), value(b), precision="highest") for a, b in pairs)


def interpreted_products(monkeypatch):
    monkeypatch.setattr(tiles, "product", lambda n, *pairs: add_up(pairs))
    monkeypatch.setattr(tiles, "products", lambda n, *sums: tuple(map(add_up, sums)))
    monkeypatch.setattr(
        tiles, "product_beside", lambda n, first, second, use: (use(add_up(first)), add_up(second))
    )
    monkeypatch.setattr(tiles, "add_products", lambda *sums: tuple(x + add_up(pairs) for x, pairs in sums))

    def looped_products(n, count, num, turn):
        def add(j, sums):
            pairs, done = turn(j)
            sums = [x + add_up(p) for x, p in zip(sums, pairs, strict=True)]
            done()
            return sums

        return jax.lax.fori_loop(0, count, add, [jnp.zeros((64, n), jnp.float32)] * num)

    monkeypatch.setattr(tiles, "looped_products", looped_products)
    monkeypatch.setattr(rowwise, "gather", lambda ref, index, n, together=False: ref[...][index])
    monkeypatch.setattr(rowwise, "corner", lambda near, far: near.at[32:, :32].set(far[32:]))
    monkeypatch.setattr(tiles, "meet", plgpu.commit_smem)

    def diagonal_inverse(a):
        place = jnp.arange(64) // 16
        block = jnp.where(place[:, None] == place, a, 0)
        eye = jnp.eye(64)
        # Powers of identical keys' blocks would overflow what is left of their differences.
        return jax.lax.fori_loop(0, 64, lambda i, x: x.at[i].set(eye[i] - block[i] @ x), jnp.zeros((64, 64)))

    monkeypatch.setattr(rowwise, "diagonal_inverse", diagonal_inverse)

    def scatter(ref, index, x):
        ref[...] = x  # every use has index = 0..63

    def keep_level(x, s):
        meet = jnp.arange(64)[:, None] ^ jnp.arange(64)
        return jnp.where(meet >> s == 1, x, 0)

    monkeypatch.setattr(rowwise, "scatter", scatter)
    monkeypatch.setattr(rowwise, "keep_level", keep_level)
    monkeypatch.setattr(rowwise, "pick_level", lambda xs, level: tuple(keep_level(x, level[0]) for x in xs))


def captured(case, x, monkeypatch, **call):
    """The `Inputs` and `Options` of a call of the public op, with these options."""
    seen = []

    def run(inputs, options, implementation):
        seen.append((inputs, options))
        return inputs.v, None

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "run", run)
        cases.call(case, {n: jnp.asarray(a) for n, a in x.items()}, "pallas", **call)
    return seen[0]
