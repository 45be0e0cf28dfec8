"""Hard mini-batches (arXiv 2304.03486): updates are spent on the batches that have the highest loss.

Batches are measured `window` at a time, without updates, by the parameters of that moment; the fraction of
them with the highest mean loss is trained on, hardest first, and the others are passed over. Measuring costs
a forward pass of every batch: with an update at about 3 of them, a window of n costs n + 3 fraction n, where
n updates cost 3 n.
"""

from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from train.data import Batch


class HardBatches(grain.DatasetIterator):
    """The hardest of every window of batches. `refill` must be called whenever `empty` says so.

    Args:
        batches: a Grain iterator over all batches.
        window: how many are measured at a time.
        fraction: of them trained on, above 0 and at most 1; at least one batch.
    """

    def __init__(self, batches: grain.DatasetIterator, window: int, fraction: float):
        super().__init__()
        self._batches, self._window = batches, window
        self._keep = max(1, round(window * fraction))
        self._begin([], None)

    def _begin(self, order: list[int], start: dict[str, Any] | None) -> None:
        """Forgets the window; the next one lies where the batches stand, or was chosen from `start` on."""
        self._order, self._start, self._taken = order, start, 0
        self._chosen: list[Batch] = []

    @property
    def empty(self) -> bool:
        """Whether a window has to be measured before the next batch."""
        return self._taken == len(self._order)

    def refill(self, measure: Callable[[Batch], float]) -> dict[str, float]:
        """Reads and measures a window.

        Args:
            measure: a batch's mean loss, the same in all processes.

        Returns:
            What there is to tell: mean losses of the window and of the chosen batches, tokens measured.
        """
        start = self._batches.get_state()
        window = [next(self._batches) for _ in range(self._window)]
        losses = np.array([measure(batch) for batch in window])
        order = np.argsort(-losses, kind="stable")[: self._keep].tolist()
        self._begin(order, start)
        self._chosen = [window[i] for i in order]
        return {
            "window_loss": float(losses.mean()),
            "hard_loss": float(losses[order].mean()),
            "measured_tokens": float(sum((batch["segment_ids"] > 0).sum() for batch in window)),
        }

    def __next__(self) -> Batch:
        if self.empty:
            raise RuntimeError("the window is used up: refill it first")
        self._taken += 1
        return self._chosen[self._taken - 1]

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-ready: where the window began, what was chosen of it and how much is done."""
        if self.empty:
            return self._batches.get_state()
        return {**self._start, "hard": {"order": self._order, "taken": self._taken, "of": self._window}}  # type: ignore[dict-item]

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position, also one of an iterator over all batches."""
        hard = state.get("hard")
        start = {name: x for name, x in state.items() if name != "hard"}
        self._batches.set_state(start)
        self._begin([], None)
        if hard is not None:
            self._begin(list(hard["order"]), start)
            window = [next(self._batches) for _ in range(hard["of"])]
            self._chosen = [window[i] for i in self._order]
            self._taken = hard["taken"]

    def close(self) -> None:
        """Ends the thread that prepares batches."""
        self._batches.close()
