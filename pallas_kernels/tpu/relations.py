"""What a chunk's tokens are to each other: decayed K K^T and Q K^T, a head's [C, C] beside the next in lanes.

``exp(G_r - G_i) <= 1`` wherever it is used, but not its factors. They are taken about an *anchor*: across
the border between two blocks both are at most 1; inside a block, about its middle, they stay within float32
while half a block's log decays sum to less than `SAFE` nats. Blocks that may decay more are halved, down to
single tokens. An unbounded gate's blocks of `CAPPED` tokens may have their middle too where operands are
bfloat16: inside such a block a token's decay counts as no less than exp(`CAP`), 1e-10, a trace of it that
nothing rounded to 2^-9 can show.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.config import Config
from pallas_kernels.tpu.dots import NN, NT, dot, dot_split_left, halves
from pallas_kernels.tpu.inverse import iota
from pallas_kernels.tpu.weave import Steps

SAFE = 80.0  # nats: exp(+-80) and its products with keys are far from float32's and bfloat16's limits


CAPPED = 8  # tokens
CAP = -SAFE / ((CAPPED - 1) / 2)  # nats


def capped(config: Config, passes: int) -> bool:
    """Whether decays inside blocks of `CAPPED` tokens are capped."""
    return passes == 1 and config.gate == "channel" and config.activation != "bounded"


def middle_block(config: Config, passes: int) -> int:
    """Size of the largest blocks whose inside may be anchored at the middle; 1: none may."""
    if config.activation != "bounded" or config.lower_bound is None:
        return CAPPED if capped(config, passes) else 1
    size = config.chunk
    while size > 1 and -config.lower_bound * size / 2 > SAFE:
        size //= 2
    return size


def beside(xs: list[jax.Array]) -> jax.Array:
    """n arrays [m, D] -> [m, n D]."""
    return xs[0] if len(xs) == 1 else jnp.concatenate(xs, axis=1)


def diagonal(xs: list[jax.Array]) -> jax.Array:
    """n arrays [m, D] -> [n m, n D], block diagonal."""
    if len(xs) == 1:
        return xs[0]
    zero = jnp.zeros_like(xs[0])
    return jnp.concatenate(
        [beside([x if i == j else zero for j in range(len(xs))]) for i, x in enumerate(xs)], axis=0
    )


def relate(rows: list[jax.Array], columns: list[jax.Array], passes: int) -> jax.Array:
    """rows columns^T of n heads side by side: n x [m, K], n x [C, K] -> [m, n C]."""
    dtype = jnp.bfloat16 if passes == 1 else jnp.float32
    rows, columns = [x.astype(dtype) for x in rows], [x.astype(dtype) for x in columns]
    return dot(beside(rows), diagonal(columns), NT, passes)


def relate_split_rows(rows: list[jax.Array], columns: list[jax.Array], passes: int) -> jax.Array:
    """`relate` with the rows to 2^-16."""
    if passes == 3:
        return relate(rows, columns, 3)
    left = stack(*(beside(list(parts)) for parts in zip(*map(halves, rows), strict=True)))
    product = dot(left, diagonal([x.astype(jnp.bfloat16) for x in columns]), NT)
    half = product.shape[0] // 2
    return product[:half] + product[half:]


def relate_split(rows: list[jax.Array], columns: list[jax.Array], passes: int) -> jax.Array:
    """`relate` with the columns to 2^-16, for sums over columns in which they cancel."""
    if passes == 3:
        return relate(rows, columns, 3)
    parts = [halves(x) for x in columns]
    right = jnp.concatenate([diagonal([p[i] for p in parts]) for i in range(2)], axis=0)  # [2 n C, n K]
    product = dot(beside([x.astype(jnp.bfloat16) for x in rows]), right, NT)
    width = product.shape[1] // 2
    return product[:, :width] + product[:, width:]


def relations_pulled(
    d: jax.Array, rows: list[jax.Array], columns: list[jax.Array], C: int, passes: int, deep: bool = True
) -> tuple[jax.Array, list[jax.Array]]:
    """Pulls d [m, n C], the gradient of rows columns^T, back to both.

    With one key in all tokens d's entries cancel in the sums: d is kept to 2^-16 (``deep``: as of
    `dot_split_left`).

    Returns:
      gradients of the rows, [m, n K], and of each head's columns, [C, K].
    """
    drows = dot_split_left(d, diagonal(columns), passes, deep)
    if passes == 3:
        turned = d.T
    else:  # high and low parts follow each other along the summed axis
        turned = jnp.concatenate(halves(d), axis=0).T  # [nC, 2 m]
        rows = [stack(x, x) for x in rows]
    return drows, [dot(turned[h * C : (h + 1) * C], x, NN, passes) for h, x in enumerate(rows)]


def stack(a: jax.Array, b: jax.Array) -> jax.Array:
    """[m, D], [m, D] -> [2 m, D]."""
    return jnp.concatenate([a, b], axis=0)


def block_rows(x: jax.Array, size: int, odd: int) -> jax.Array:
    """Rows of the even (``odd`` = 0) or odd blocks of ``size``."""
    starts = range(odd * size, x.shape[0], 2 * size)
    parts = [x[s : s + size] for s in starts]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def spread_rows(x: jax.Array, size: int, odd: int) -> jax.Array:
    """The inverse of `block_rows`: [C / 2, D] -> [C, D] with zeros in the other blocks."""
    parts = []
    for s in range(0, x.shape[0], size):
        block, zero = x[s : s + size], jnp.zeros_like(x[s : s + size])
        parts += [zero, block] if odd else [block, zero]
    return jnp.concatenate(parts, axis=0)


def on_rows(f, x: jax.Array, y: jax.Array, size: int, odd: int) -> jax.Array:
    """x [C, D] with f(its even or odd blocks of ``size``, y [C / 2, D]) in their place."""
    new = f(block_rows(x, size, odd), y)
    parts = []
    for i, start in enumerate(range(0, x.shape[0], 2 * size)):
        kept = x[start + (1 - odd) * size : start + (2 - odd) * size]
        block = new[i * size : (i + 1) * size]
        parts += [kept, block] if odd else [block, kept]
    return jnp.concatenate(parts, axis=0)


def border(G: jax.Array, size: int) -> jax.Array:
    """[C, K]: G at the last token of the even block of each token's pair of blocks of ``size``."""
    C, K = G.shape
    if size >= 8:
        parts = [jnp.broadcast_to(G[s + size - 1 : s + size], (2 * size, K)) for s in range(0, C, 2 * size)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)
    rows = G.reshape(C // 8, 8, K)
    row = iota(rows.shape, 1)
    out = rows
    for start in range(0, 8, 2 * size):
        anchor = jnp.broadcast_to(rows[:, start + size - 1 : start + size], rows.shape)
        out = jnp.where(row // (2 * size) == start // (2 * size), anchor, out)
    return out.reshape(C, K)


class Decays:
    """A chunk's cumulative log2 decays of one head, and the factors across each anchor."""

    def __init__(self, G: jax.Array, near: jax.Array | None, config: Config, passes: int):
        """Args:
        G: [C, K].
        near: if `capped`, [C, K]: G, capped, less its value at the middle of each block.
        config: the call.
        passes: of the products.
        """
        self.G, self.near = G, near
        self.middle = middle_block(config, passes)
        self.bounded = config.activation == "bounded"
        self.levels = [s for s in (1, 2, 4, 8, 16, 32, 64) if self.middle <= s < config.chunk]

    def across(self, size: int) -> jax.Array:
        """exp(-|G - border|): of odd blocks' rows since, of even blocks' rows until the border. All <= 1."""
        anchor = border(self.G, size)
        if size < 8:
            return jnp.exp2(-jnp.abs(self.G - anchor))
        parts = []
        for s in range(0, self.G.shape[0], 2 * size):
            even, odd = slice(s, s + size), slice(s + size, s + 2 * size)
            parts += [anchor[even] - self.G[even], self.G[odd] - anchor[odd]]
        return jnp.exp2(jnp.concatenate(parts, axis=0))

    def inside(self) -> tuple[jax.Array, jax.Array]:
        """exp(G - middle) and exp(middle - G) of each block of ``middle`` tokens."""
        if self.near is not None:
            return jnp.exp2(self.near), jnp.exp2(-self.near)
        size = self.middle
        middles = [
            jnp.broadcast_to(self.G[s + size // 2 : s + size // 2 + 1], (size, self.G.shape[1]))
            for s in range(0, self.G.shape[0], size)
        ]
        difference = self.G - (middles[0] if len(middles) == 1 else jnp.concatenate(middles, axis=0))
        return jnp.exp2(difference), jnp.exp2(-difference)


def meet_at(shape: tuple[int, ...], C: int, size: int) -> jax.Array:
    """Whether a [C, nC] entry's row is in an odd block of ``size`` and its column in the even one before."""
    row, column = iota(shape, 0), iota(shape, 1) % C
    return (row // size == column // size + 1) & ((column // size) % 2 == 0)


def channel_relations(
    q: list[jax.Array], k: list[jax.Array], decays: list[Decays], C: int, passes: int, out: list
) -> Steps:
    """Decayed relations of a per-channel gate.

    Args:
      q, k: of each head [C, K] float32.
      decays: of each head.
      C: chunk size.
      passes: of the products.
      out: receives kk (rows after columns; elsewhere arbitrary, maybe not finite) and qk (the same, and
        its diagonal), both [C, n C] float32.
    """
    n = len(q)
    shape = (C, n * C)
    kk = qk = None
    if decays[0].middle > 1:
        rows, columns = [], []
        for q_h, k_h, d in zip(q, k, decays, strict=True):
            since, until = d.inside()
            rows.append(stack(k_h * since, q_h * since))
            columns.append(k_h * until)
            yield
        product = relate(rows, columns, passes)
        kk, qk = product[:C], product[C:]
    else:
        diag = [jnp.sum(q_h * k_h, axis=1, keepdims=True) for q_h, k_h in zip(q, k, strict=True)]
        kk = jnp.zeros(shape, jnp.float32)
        qk = beside([jnp.where(iota((C, C), 0) == iota((C, C), 1), x, 0.0) for x in diag])
    yield
    for size in decays[0].levels:
        rows, columns = [], []
        for q_h, k_h, d in zip(q, k, decays, strict=True):
            factor = d.across(size)
            k_d, q_d = k_h * factor, q_h * factor
            if size >= 8:
                rows.append(stack(block_rows(k_d, size, 1), block_rows(q_d, size, 1)))
                columns.append(spread_rows(block_rows(k_d, size, 0), size, 0))
            else:
                rows.append(stack(k_d, q_d))
                columns.append(k_d)
            yield
        # Half of all pairs meet at the chunk's middle. Decays without a bound may be slow: errors add up.
        most = size == C // 2 and not decays[0].bounded
        product = (relate_split_rows if most else relate)(rows, columns, passes)
        half = product.shape[0] // 2
        kk_s, qk_s = product[:half], product[half:]
        here = meet_at(shape, C, size)
        if size >= 8:
            odd = block_rows(here, size, 1)
            kk, qk = (
                on_rows(lambda old, new, odd=odd: jnp.where(odd, new, old), x, y, size, 1)
                for x, y in ((kk, kk_s), (qk, qk_s))
            )
        else:
            kk, qk = jnp.where(here, kk_s, kk), jnp.where(here, qk_s, qk)
        yield
    out += [kk, qk]


class RelationGradients(NamedTuple):
    """Of each head, [C, K] float32; G's in nats."""

    q: list[jax.Array]
    k: list[jax.Array]
    G: list[jax.Array]


def channel_relation_gradients(
    q: list[jax.Array],
    k: list[jax.Array],
    decays: list[Decays],
    dkk: jax.Array,
    dqk: jax.Array,
    C: int,
    passes: int,
    out: RelationGradients,
) -> Steps:
    """Pulls gradients of `channel_relations` back to q, k and G.

    With rows x_r = x exp(G_r - anchor) and columns y_i = k exp(anchor - G_i), each anchor's products are
    x y^T: plain products, pulled back as such. dG_r gains x_r dx_r and dG_i loses y_i dy_i, both with the
    operands as they were rounded, so that what cancels in a sum over tokens cancels exactly; the anchor's own
    share is zero.

    Args:
      q, k, decays: as there.
      dkk, dqk: [C, n C], zero where `channel_relations` leaves arbitrary entries.
      C: chunk size.
      passes: of the products.
      out: lists to receive each head's gradients.
    """
    work = jnp.bfloat16 if passes == 1 else jnp.float32
    heads = range(len(q))
    K = q[0].shape[1]
    dq, dk, dG = ([jnp.zeros_like(k[0]) for _ in heads] for _ in range(3))
    middle = decays[0].middle
    row, column = iota(dkk.shape, 0), iota(dkk.shape, 1) % C
    anchors = ([0] if middle > 1 else []) + decays[0].levels  # 0: inside the middle-anchored blocks
    for size in anchors:
        sliced = size >= 8
        here = meet_at(dkk.shape, C, size) if size else row // middle == column // middle
        a, b = jnp.where(here, dkk, 0.0), jnp.where(here, dqk, 0.0)
        if sliced:
            a, b = block_rows(a, size, 1), block_rows(b, size, 1)
        d = stack(a, b)  # [2C or C, nC]
        factors, rows, columns = [], [], []
        for h in heads:
            since, until = decays[h].inside() if not size else [decays[h].across(size)] * 2
            k_rows, q_rows, k_columns = k[h] * since, q[h] * since, k[h] * until
            if sliced:
                k_rows, q_rows = block_rows(k_rows, size, 1), block_rows(q_rows, size, 1)
                k_columns = spread_rows(block_rows(k_columns, size, 0), size, 0)
            factors.append((since, until))
            rows.append(stack(k_rows, q_rows).astype(work))
            columns.append(k_columns.astype(work))
            yield
        drows, dcolumns = relations_pulled(d, rows, columns, C, passes)
        yield
        for h in heads:
            x = drows[:, h * K : (h + 1) * K]
            half = x.shape[0] // 2
            own = x * rows[h].astype(jnp.float32)
            dk_rows, dq_rows, own = x[:half], x[half:], own[:half] + own[half:]
            (since, until), y, dy = factors[h], columns[h].astype(jnp.float32), dcolumns[h]
            if sliced:  # odd blocks gain as rows, even ones as columns
                since = block_rows(since, size, 1)
                until, y, dy = (block_rows(z, size, 0) for z in (until, y, dy))
                dq[h] = on_rows(jnp.add, dq[h], dq_rows * since, size, 1)
                dk[h] = on_rows(jnp.add, dk[h], dk_rows * since, size, 1)
                dk[h] = on_rows(jnp.add, dk[h], dy * until, size, 0)
                dG[h] = on_rows(jnp.add, dG[h], own, size, 1)
                dG[h] = on_rows(jnp.subtract, dG[h], dy * y, size, 0)
            else:
                dq[h] += dq_rows * since
                dk[h] += dk_rows * since + dy * until
                dG[h] += own - dy * y
            yield
    if middle == 1:  # q_r k_r on the diagonal, undecayed
        for h in heads:
            own = (row == column) & (iota(dqk.shape, 1) // C == h)
            same = jnp.sum(jnp.where(own, dqk, 0.0), axis=1, keepdims=True)
            dq[h] += same * k[h]
            dk[h] += same * q[h]
    out.q.extend(dq)
    out.k.extend(dk)
    out.G.extend(dG)
    yield
