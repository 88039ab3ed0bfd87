"""Inputs for the tests of the kernels that switch LoRA experts, and what each of their paths is held to."""

from dataclasses import dataclass, replace

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# tokens, in, out, E, r, k
SHAPES = (
    (1, 40, 24, 1, 4, 1),
    (3, 65, 129, 3, 20, 2),
    (17, 40, 129, 5, 16, 3),
    (17, 65, 24, 5, 1, 1),
    (3, 40, 24, 3, 8, 3),
)


@dataclass(frozen=True)
class Layer:
    """A linear layer with experts, and tokens with their routes."""

    x: torch.Tensor
    W: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    base: torch.Tensor
    bias: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @property
    def gates(self):
        """The routes as `[T, E]`."""
        empty = torch.zeros(len(self.x), len(self.A), dtype=self.weights.dtype, device=self.x.device)
        return empty.scatter(1, self.ids.long(), self.weights)

    def moved(self, change):
        """A copy with `change` applied to every floating-point tensor but the weights."""
        return replace(self, **{name: change(getattr(self, name)) for name in ("x", "W", "A", "B", "base", "bias")})


def layer_of(shape, dtype=torch.float32, *, exact=False, seed=0):
    """Return random inputs; sums of `exact` ones are exact in float32 in any order, so that all paths agree bit for bit.

    The last token of three or more has no expert: its weights are 0.
    """
    tokens, width, out, experts, rank, k = shape
    g = torch.Generator().manual_seed(seed)

    def numbers(*size):
        if exact:
            return torch.randint(-2, 3, size, generator=g).to(dtype)
        return torch.randn(size, generator=g).to(dtype)

    def sixteenths(*size):
        return (torch.randint(-64, 65, size, generator=g) / 16).to(dtype) if exact else numbers(*size)

    shrink = 1.0 if exact else width**-0.5
    ids = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)]).int()
    weights = torch.randint(0, 3, (tokens, k), generator=g) / 2 if exact else torch.rand(tokens, k, generator=g) + 0.1
    if tokens >= 3:
        weights[-1] = 0.0
    return Layer(
        x=numbers(tokens, width),
        W=sixteenths(out, width) if exact else sixteenths(out, width) * shrink,
        A=numbers(experts, rank, width) if exact else numbers(experts, rank, width) * shrink,
        B=numbers(out, experts * rank),
        base=sixteenths(tokens, out),
        bias=sixteenths(out),
        ids=ids,
        weights=weights,
    )


def strided(tensor):
    """The same numbers, no dimension contiguous."""
    wide = torch.full(
        (*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype, device=tensor.device
    )
    wide[..., ::2] = tensor
    return wide[..., ::2]


def bits(tensor):
    """The bit patterns, to tell -0.0 from 0.0."""
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_rounded_alike(ours, theirs):
    """Hold float32 to 1e-5; the shorter ones to a unit in the last place, and to the same number in 99 of 100 places."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if ours.dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        return
    ordered = [torch.where(part >= 0, part, -32768 - part) for part in (bits(one).int() for one in (ours, theirs))]
    apart = (ordered[0] - ordered[1]).abs()
    small = (ours.float() - theirs.float()).abs() <= 1e-5  # next to 0 the sum's own error is many units
    assert ((apart <= 1) | small).all(), (ours[apart > 1], theirs[apart > 1])
    assert (apart > 0).float().mean() < 0.01 or apart.sum() <= 1
