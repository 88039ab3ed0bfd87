"""Temperature heads on cached features: one call for heads that read one hidden state and for heads that read windows.

Windows are padded on the right; attention is causal, so no state sees the padding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmrl.ats.features import TokenFeatures
from llmrl.logits_heads import TemperatureHead

_BLOCK = 65536  # states at a time where nothing is kept for a backward pass
_SEQUENCE_BLOCK = 8192


def head_log_scales(head: TemperatureHead, features: TokenFeatures) -> Tensor:
    """Return log s `[N]` of any temperature head on the tokens of `features`, on the CPU."""
    result = torch.empty(len(features))
    with torch.inference_mode():
        if head.reads_sequence:
            order = window_lengths(features).argsort()  # little padding
            batches = list(window_batches(features, order, _SEQUENCE_BLOCK))
        else:
            batches = list(torch.arange(len(features)).split(_BLOCK))
        for tokens in batches:
            result[tokens] = batch_log_scales(head, features, tokens)
    return result


def batch_log_scales(head: TemperatureHead, features: TokenFeatures, tokens: Tensor) -> Tensor:
    """Return log s `[n]` of the tokens at the indices `tokens`, on the CPU; differentiable in the head's parameters."""
    if not head.reads_sequence:
        return head(features.states[features.row[tokens]])[:, 0].cpu()
    row, window = features.row[tokens], features.window[tokens]
    numbers, place = window.unique(return_inverse=True)
    start, end = features.offsets[numbers], features.offsets[numbers + 1]
    position = row - start[place]
    width = int(position.max()) + 1  # states after a window's last scored token are seen by none
    states = features.states[(start[:, None] + torch.arange(width)).minimum(end[:, None] - 1)]
    return head(states)[..., 0].cpu()[place, position]


def window_lengths(features: TokenFeatures) -> Tensor:
    """Return the number of states of each different window of `features`, in the order of the windows.

    Raises:
        ValueError: only the states of scored tokens were kept.
    """
    if not features.has_sequences:
        raise ValueError("this head reads whole windows: extract the features with sequences=True")
    numbers = features.window.unique_consecutive()
    return features.offsets[numbers + 1] - features.offsets[numbers]


def window_batches(features: TokenFeatures, order: Tensor, size: int) -> Iterator[Tensor]:
    """Yield indices of the tokens of whole windows, as many windows as come to `size` positions, padding included.

    Args:
        features: tokens of W windows, each window's together.
        order: permutation of 0 to W - 1.
        size: positions of a batch; a longer window is a batch of its own.
    """
    counts = features.window.unique_consecutive(return_counts=True)[1]
    first = counts.cumsum(0) - counts
    lengths = window_lengths(features) if features.has_sequences else counts
    batch: list[int] = []
    widest = 0
    for i in order.tolist():
        widest = max(widest, int(lengths[i]))
        if batch and widest * (len(batch) + 1) > size:
            yield _tokens(first, counts, batch)
            batch, widest = [], int(lengths[i])
        batch.append(i)
    if batch:
        yield _tokens(first, counts, batch)


def _tokens(first: Tensor, counts: Tensor, windows: list[int]) -> Tensor:
    return torch.cat([torch.arange(int(first[i]), int(first[i] + counts[i])) for i in sorted(windows)])
