"""Bootstrap over clusters of tokens: draws as weights, sums per draw.

Tokens of one window are not independent, so whole windows are drawn. A metric that is a function of sums over windows costs
one matrix product for all draws: the weights of the draws `[draws, windows]` times the sums of the windows.

Resampling adds noise to every bin, which lifts each calibration error: their intervals are basic ones, see `llmrl.intervals`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmrl.intervals import draw_counts

Array = NDArray[np.float64]
MIN_CLUSTERS = 20
_TABLE = 1 << 22  # cells of sums held at a time (32 MB), however many windows there are


def draw_weights(window: NDArray[np.int64], draws: int, seed: int) -> Array:
    """Return how often each window is drawn, `[draws, windows]`; windows are numbered by their sorted index."""
    return draw_counts(len(np.unique(window)), draws, seed)


def sums_by_draw(
    weights: Array, window: NDArray[np.int64], cell: NDArray[np.int64], cells: int, values: Array | None = None
) -> Array:
    """Return `[draws, cells]`: under each draw the sum of `values` (or the count) of the tokens in each cell.

    Args:
        weights: `[draws, windows]`, of `draw_weights`.
        window: `[N]`, index into windows, ascending.
        cell: `[N]`, the cell of each token, in [0, cells).
        cells: number of cells.
        values: `[N]`, or None to count.
    """
    windows, block = weights.shape[1], max(1, _TABLE // cells)
    out = np.zeros((len(weights), cells))
    for start in range(0, windows, block):
        stop = min(start + block, windows)
        inside = slice(*np.searchsorted(window, [start, stop]).tolist())
        flat = (window[inside] - start) * cells + cell[inside]
        table = np.bincount(flat, None if values is None else values[inside], minlength=(stop - start) * cells)
        out += weights[:, start:stop] @ table.reshape(stop - start, cells)
    return out


def clusters_of(window: NDArray[np.int64], *, questions: bool = False) -> tuple[NDArray[np.int64], str]:
    """Return what the bootstrap draws, a cluster number per token, and its name.

    Windows, or, where there are fewer than MIN_CLUSTERS of them, blocks of consecutive tokens: one window drawn again and
    again would give an interval of no width. Where `window` numbers the questions of answers, questions however few they
    are: answers to one of them are right and wrong together, and a block of them would count as so many questions.
    """
    if questions:
        return window, "question"
    if len(np.unique(window)) >= MIN_CLUSTERS:
        return window, "window"
    size = max(1, len(window) // (2 * MIN_CLUSTERS))
    return np.arange(len(window), dtype=np.int64) // size, f"block of {size} tokens"
