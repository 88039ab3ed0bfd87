"""`scaled_lse_sweep` for GPUs: logits exist one tile at a time, in registers.

A program takes a block of tokens and a share of the vocabulary. For each tile of entries it forms z on the tensor cores,
then moves the running moments of its tokens along: with m the largest logit so far and m' the new one,

    l = sum exp(s (z - m)),          l' = exp(s (m - m')) l                    + sum of the tile
    e = sum exp(s (z - m)) (z - m),  e' = exp(s (m - m')) (e + (m - m') l)     + sum of the tile

The shares are joined afterwards by `merge`, in plain torch on `[shares, N]`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEW_ROWS = 256  # below it another tile is best than above
_SHARE_ENTRIES = 1024  # of the vocabulary at least: a smaller share is all start-up


@triton.jit
def _rounded(x: tl.tensor, dtype: tl.constexpr, INTERPRET: tl.constexpr) -> tl.tensor:
    """Round float32 to `dtype` and back, to the nearest, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def _sweep_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    labels: tl.tensor,
    scale: tl.tensor,
    sums: tl.tensor,
    argmax: tl.tensor,
    N: tl.tensor,
    V: tl.tensor,
    H: tl.tensor,
    hidden_row: tl.tensor,
    hidden_column: tl.tensor,
    weight_row: tl.tensor,
    weight_column: tl.tensor,
    logit_scale: tl.tensor,
    soft_cap: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN_H: tl.constexpr,
    FEW: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    FLOOR: tl.constexpr = -1e30
    dtype: tl.constexpr = weight.dtype.element_ty
    share = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < N
    row = tl.load(rows + n, mask=live, other=0).to(tl.int64)
    label = tl.load(labels + n, mask=live, other=-1).to(tl.int32)
    rate = tl.load(scale + n, mask=live, other=1.0) * 1.4426950408889634  # exp(s x) = 2^(rate x)
    k = tl.arange(0, BLOCK_H)

    top = tl.full([BLOCK_N], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    weighted = tl.zeros([BLOCK_N], tl.float32)
    plain = tl.zeros([BLOCK_N], tl.float32)
    target = tl.zeros([BLOCK_N], tl.float32)
    best = tl.zeros([BLOCK_N], tl.int32)

    tiles = tl.cdiv(V, BLOCK_V)
    each = tl.cdiv(tiles, tl.num_programs(1))
    for tile in range(share * each, tl.minimum(share * each + each, tiles)):
        v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        entry = tl.minimum(v, V - 1)  # past the end: read what is there, mask it below
        left = hidden + row[:, None] * hidden_row + k[None, :] * hidden_column
        right = weight + entry.to(tl.int64)[None, :] * weight_row + k[:, None] * weight_column
        z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start in range(0, H, BLOCK_H):
            if EVEN_H:
                a = tl.load(left)
                b = tl.load(right)
            else:
                a = tl.load(left, mask=k[None, :] < H - start, other=0.0)
                b = tl.load(right, mask=k[:, None] < H - start, other=0.0)
            if INTERPRET:  # its product of bfloat16 is of the bit patterns
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            z = tl.dot(a, b, z, input_precision="ieee")
            left += BLOCK_H * hidden_column
            right += BLOCK_H * weight_column

        absent = v >= V
        if HAS_BIAS:
            shift = tl.load(bias + entry).to(tl.float32)
            absent = absent | (shift == -float("inf"))
            z += tl.where(absent, 0.0, shift)[None, :]
        z = _rounded(z, dtype, INTERPRET) * logit_scale
        if HAS_CAP:
            t = tl.exp(-2.0 * tl.abs(z / soft_cap))
            t = soft_cap * (1.0 - t) / (1.0 + t)
            z = tl.where(z < 0.0, -t, t)

        plain += tl.sum(tl.where(absent[None, :], 0.0, z), 1)
        z = tl.where(absent[None, :], -float("inf"), z)
        if tl.max(((label >= tile * BLOCK_V) & (label < (tile + 1) * BLOCK_V)).to(tl.int32), 0) > 0:
            target += tl.sum(tl.where(v[None, :] == label[:, None], z, 0.0), 1)
        tile_top = tl.max(z, 1)
        tile_best = tl.min(tl.where(z == tile_top[:, None], v[None, :], V), 1)
        best = tl.where(tile_top > top, tile_best, best)  # not on equality: the first of equals stays
        new_top = tl.maximum(top, tile_top)
        moved = top - new_top
        rescale = tl.exp2(moved * rate)
        z -= new_top[:, None]
        p = tl.exp2(z * rate[:, None])
        weighted = rescale * (weighted + moved * total) + tl.sum(p * tl.maximum(z, FLOOR), 1)
        total = rescale * total + tl.sum(p, 1)
        top = new_top

    shares = tl.num_programs(1)
    out = share * N + n
    tl.store(sums + out, top, mask=live)
    tl.store(sums + shares * N + out, total, mask=live)
    tl.store(sums + 2 * shares * N + out, weighted, mask=live)
    tl.store(sums + 3 * shares * N + out, plain, mask=live)
    tl.store(sums + 4 * shares * N + out, target, mask=live)
    tl.store(argmax + out, best, mask=live)


INTERPRETED = not isinstance(_sweep_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET=1


def _tile(tokens: int, entries: int, width: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_N": tokens, "BLOCK_V": entries, "BLOCK_H": width}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


# None of them spills registers on Hopper without bias and soft-cap. What is best depends on the shape and on the card: the
# first call for a (H, V) tries them all; one that needs more shared memory than there is drops out.
_HALF_TILES = [
    _tile(128, 256, 64, 8, 3),
    _tile(128, 128, 64, 8, 3),
    _tile(128, 128, 32, 4, 4),
    _tile(64, 256, 32, 4, 4),
    _tile(64, 128, 64, 4, 3),
]
_FLOAT_TILES = [_tile(64, 64, 32, 4, 3), _tile(64, 128, 16, 8, 3)]
_KEY = ["H", "V", "FEW"]
_tuned_kernels = {
    2: triton.autotune(_HALF_TILES, key=_KEY)(_sweep_kernel),
    4: triton.autotune(_FLOAT_TILES, key=_KEY)(_sweep_kernel),
}


def sweep_parts(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    scale: Tensor,
    logit_scale: float,
    soft_cap: float,
    *,
    shares: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sweep over `shares` parts of the vocabulary side by side.

    Args:
        hidden: `[N, H]` in the weight's dtype, any strides.
        weight: `[V, H]` bfloat16, float16 or float32, any strides.
        bias: `[V]` in the weight's dtype, any stride, or None; -inf marks an absent entry.
        rows: `[M]` int64, contiguous as the next two: the rows of `hidden` to sweep for, M >= 1.
        labels: `[M]` integers in [0, V).
        scale: `[M]` float32, s > 0.
        logit_scale: factor of the logits.
        soft_cap: soft-cap of the logits, 0 for none.
        shares: None chooses as many as fill the card.

    Returns:
        `[5, shares, M]` float32 and `[shares, M]` int32: the fields of `Moments` in their order.
    """
    if not (INTERPRETED or hidden.is_cuda):
        raise ValueError("the Triton kernel runs on a GPU: move the tensors there, or set TRITON_INTERPRET=1")
    (vocab, width), tokens = weight.shape, len(rows)
    shares = shares or _shares_for(tokens, vocab, hidden.device)
    sums = torch.empty(5, shares, tokens, dtype=torch.float32, device=hidden.device)
    argmax = torch.empty(shares, tokens, dtype=torch.int32, device=hidden.device)
    bias_or_any = weight if bias is None else bias.contiguous()
    tensors = (hidden, weight, bias_or_any, rows, labels, scale, sums, argmax)
    numbers = (tokens, vocab, width, *hidden.stride(), *weight.stride(), logit_scale, soft_cap)
    flags = {
        "HAS_BIAS": bias is not None,
        "HAS_CAP": soft_cap > 0.0,
        "EVEN_H": width % 64 == 0,  # of every BLOCK_H
        "FEW": tokens <= _FEW_ROWS,  # for the tuner alone
        "INTERPRET": INTERPRETED,
    }
    if INTERPRETED:
        grid = (triton.cdiv(tokens, 32), shares)
        _sweep_kernel[grid](*tensors, *numbers, **flags, BLOCK_N=32, BLOCK_V=64, BLOCK_H=32)
    else:
        with torch.cuda.device(hidden.device):  # Triton launches on the current one
            kernel = _tuned_kernels[weight.element_size()]
            kernel[lambda tile: (triton.cdiv(tokens, tile["BLOCK_N"]), shares)](*tensors, *numbers, **flags)
    return sums, argmax


def _shares_for(tokens: int, vocab: int, device: torch.device) -> int:
    """Return the fewest shares with which blocks of 128 tokens keep nine tenths of the card busy."""
    if INTERPRETED:
        return 2
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return fewest_shares(triton.cdiv(tokens, 128), processors, max(1, vocab // _SHARE_ENTRIES))


def fewest_shares(blocks: int, processors: int, most: int) -> int:
    """Return the fewest shares, at most `most`, whose `blocks * shares` programs fill rounds of `processors` to 90 %.

    Where none does, the number that fills them best.
    """

    def filled(shares: int) -> float:
        programs = blocks * shares
        return programs / (triton.cdiv(programs, processors) * processors)

    good = [shares for shares in range(1, most + 1) if filled(shares) >= 0.9]
    return good[0] if good else max(range(1, most + 1), key=filled)
