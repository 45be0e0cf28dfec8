"""`python -m train.experiments.hard_batches`: hard mini-batches (arXiv 2304.03486) on scikit-learn's digits.

A small MLP reads 8 x 8 images of digits. An epoch deals the shuffled images into N mini-batches. Two readings
of the method are compared with plain mini-batches, and each with a control that takes random mini-batches:

- select: all N are measured without updates, then the fraction delta with the highest loss is trained on.
- extra: all N are trained on as usual, their losses as they went by are kept, and the fraction delta with the
  highest is trained on once more.

Counted are epochs to a target accuracy on held-out images, and work in units of one mini-batch's forward
pass, an update being 3 (forward, and a backward pass of twice that): 3 N plain, N + 3 delta N select,
3 N + 3 delta N extra.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deltajax import command
from train.experiments.command import simulate

if TYPE_CHECKING:
    import jax
    import numpy as np

Mode = Literal["plain", "select", "extra"]


@dataclass(frozen=True)
class Options:
    """Epochs and work to a target accuracy, plain against hard mini-batches."""

    out: Path = Path("runs/hard_batches.json")
    """results, as JSON"""
    deltas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.8)
    """fractions of the mini-batches taken as hard"""
    modes: tuple[Mode, ...] = ("select", "extra")
    """what hard mini-batches are used for"""
    seeds: int = 20
    """repetitions: split, parameters and order"""
    epochs: int = 60
    """at most"""
    target: float = 0.95
    """accuracy on held-out images"""
    batch: int = 16
    """images of a mini-batch"""
    width: int = 64
    """of the hidden layer"""
    rate: float = 0.02
    """learning rate of SGD"""
    momentum: float = 0.9
    """of SGD"""
    held_out: int = 360
    """images of the accuracy, of 1797"""


def main(args: Sequence[str] | None = None) -> int:
    """Parses options, trains, writes the results, and returns the exit status."""
    packages = {"jax", "optax", "sklearn", "tyro"}
    return command.with_packages(
        lambda: simulate("train.experiments.hard_batches", Options, run, args),
        "scikit-learn deltajax[train]",
        packages,
    )


def run(options: Options, say: Callable[[str], object]) -> dict[str, Any]:
    """All methods: accuracy after every epoch, epochs and work to the target, with confidence."""
    from train.experiments.statistics import mean_and_band

    batches = (1797 - options.held_out) // options.batch
    methods: list[tuple[Mode, float, bool]] = [("plain", 0.0, True)]
    methods += [
        (mode, delta, hard) for mode in options.modes for delta in options.deltas for hard in (True, False)
    ]
    rows, plain = [], None
    for mode, delta, hard in methods:
        curves = train(options, mode, max(1, round(delta * batches)), hard)  # [seeds, epochs]
        reached = (curves >= options.target).any(1)
        epochs = [float(x) for x in (curves >= options.target).argmax(1) + 1.0]
        epochs = [x if r else float(options.epochs) for x, r in zip(epochs, reached, strict=True)]
        cost = work(mode, batches, max(1, round(delta * batches)))
        plain = plain or (epochs, cost)
        row: dict[str, Any] = {"mode": mode, "delta": delta, "hard": hard, "reached": float(reached.mean())}
        # Against plain training of the same seed.
        saved = [1 - x / y for x, y in zip(epochs, plain[0], strict=True)]
        saved_work = [1 - x * cost / (y * plain[1]) for x, y in zip(epochs, plain[0], strict=True)]
        for name, values in (
            ("epochs", epochs),
            ("fewer_epochs", saved),
            ("less_work", saved_work),
            ("accuracy", [float(x) for x in curves[:, -1]]),
        ):
            row[name], row[f"{name}_band"] = mean_and_band(values)
        row["work"] = row["epochs"] * cost
        row["curve"] = [round(float(x), 4) for x in curves.mean(0)]
        rows.append(row)
        say(
            f"{mode:6} delta {delta:.1f} {'hardest' if hard else 'random '}: {row['epochs']:5.1f} epochs "
            f"({row['fewer_epochs']:+.0%} +- {row['fewer_epochs_band']:.0%} fewer), work {row['work']:6.0f} "
            f"({row['less_work']:+.0%} +- {row['less_work_band']:.0%} less), "
            f"accuracy {row['accuracy']:.4f} +- {row['accuracy_band']:.4f}, "
            f"{row['reached']:.0%} reached {options.target}"
        )
    return {"options": dataclasses.asdict(options), "mini_batches": batches, "rows": rows}


def work(mode: Mode, batches: int, hard: int) -> int:
    """Of an epoch, in forward passes of a mini-batch."""
    return {"plain": 3 * batches, "select": batches + 3 * hard, "extra": 3 * batches + 3 * hard}[mode]


def train(options: Options, mode: Mode, count: int, hard: bool) -> "np.ndarray":
    """Accuracy on held-out images after each epoch, [seeds, epochs].

    Args:
        options: sizes.
        mode: what the `count` mini-batches are used for.
        count: how many are taken as hard.
        hard: take those of the highest loss; else random ones.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.data.astype(np.float32) / 16, digits.target.astype(np.int32)
    splits = np.stack([np.random.default_rng(s).permutation(len(images)) for s in range(options.seeds)])
    one = functools.partial(_train_one, options, mode, count, hard, jnp.asarray(images), jnp.asarray(labels))
    keys = jax.vmap(jax.random.key)(jnp.arange(options.seeds))
    return np.asarray(jax.jit(jax.vmap(one))(keys, jnp.asarray(splits)))


def _train_one(
    options: Options,
    mode: Mode,
    count: int,
    hard: bool,
    images: "jax.Array",
    labels: "jax.Array",
    key: "jax.Array",
    split: "jax.Array",
) -> "jax.Array":
    """One repetition: images [n, 64], labels [n], a permutation of them -> accuracies [epochs]."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    test, rest = split[: options.held_out], split[options.held_out :]
    batches = len(rest) // options.batch
    optimizer = optax.sgd(options.rate, options.momentum)
    init, shuffling = jax.random.split(key)
    rngs = nnx.Rngs(init)
    model = nnx.Sequential(
        nnx.Linear(images.shape[1], options.width, rngs=rngs),
        nnx.relu,
        nnx.Linear(options.width, 10, rngs=rngs),
    )
    graph, params = nnx.split(model)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    def update(state: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    def epoch(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        order, chance = jax.random.split(key)
        deal = jax.random.permutation(order, rest)[: batches * options.batch].reshape(batches, -1)
        if mode == "select":
            losses = jax.vmap(loss, (None, 0))(state[0], deal)
        else:
            state, losses = jax.lax.scan(update, state, deal)
        if mode != "plain":
            ranked = losses if hard else jax.random.uniform(chance, losses.shape)
            state, _ = jax.lax.scan(update, state, deal[jax.lax.top_k(ranked, count)[1]])
        predicted = jnp.argmax(nnx.merge(graph, state[0])(images[test]), -1)
        return state, jnp.mean(predicted == labels[test])

    keys = jax.random.split(shuffling, options.epochs)
    return jax.lax.scan(epoch, (params, optimizer.init(params)), keys)[1]


if __name__ == "__main__":
    sys.exit(main())
