"""Layers for the tests of the merge, and random routes."""

import torch

from llmrl_kernels import MergeItem

# M, N, r: ragged on purpose
LAYERS = ((40, 65, 4), (129, 24, 20), (1, 7, 1), (64, 32, 16))


def merge_items(experts=5, dtype=torch.float32, *, layers=LAYERS, exact=False, seed=0, device="cpu"):
    """Return items whose out is NaN. `exact`: small integers and 16ths, whose sums are exact in float32 in any order."""
    g = torch.Generator().manual_seed(seed)

    def numbers(*size):
        found = torch.randint(-2, 3, size, generator=g).float() if exact else torch.randn(size, generator=g)
        return found.to(dtype).to(device)

    items = []
    for height, width, rank in layers:
        base = numbers(height, width) / 16 if exact else numbers(height, width)
        base.flatten()[::3] = 0.0
        base.flatten()[::6] = -0.0
        down, up = numbers(experts, rank, width), numbers(height, experts * rank)
        items.append(MergeItem(base, torch.full_like(base, torch.nan), down, up if exact else up * rank**-0.5))
    return items


def routes(count, experts, k, seed=0):
    """Yield random routes, with ids that differ and weights in [0, 1)."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randperm(experts, generator=g)[:k].int(), torch.rand(k, generator=g)
