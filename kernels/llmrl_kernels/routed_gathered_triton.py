"""`routed_shrink_gathered` and `routed_expand_gathered` for GPUs, in two forms.

Few tokens (decoding): a program a token, which walks through the experts of that token. Many (prefill, training): for each of
the k slots the tokens are sorted by expert and cut into blocks of one expert each. The table of blocks has the length it can
have at most, so a launch never depends on the routes. Two tokens of a slot never share a row, so slot after slot adds without
atomics, in float32, and the last one rounds. An id outside [0, E) makes NaN of its rows and reads nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmrl_kernels.triton_parts import INTERPRETED, dot, inner_block, rounded
from llmrl_kernels.tuning import block_sizes

FEW_TOKENS = 16  # up to here a program a token


@triton.jit
def _few_shrink_kernel(
    x: tl.tensor,
    a: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    u: tl.tensor,
    h: tl.tensor,
    E: tl.tensor,
    K: tl.tensor,
    rank: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    SLOTS: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    pair = tl.program_id(0)
    row = (pair // SLOTS).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    expert = tl.load(ids + pair)
    known = (expert >= 0) & (expert < E)
    down = a + (expert.to(tl.int64) * rank + r)[:, None] * K + k[None, :]
    part = x + row * x_row + k * x_column
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        live = k < K - start
        features = tl.load(part, mask=live, other=0.0).to(tl.float32)
        acc += (
            tl.load(down, mask=(known & (r < rank))[:, None] & live[None, :], other=0.0).to(tl.float32)
            * features[None, :]
        )
        part += BLOCK_K * x_column
        down += BLOCK_K
    total = tl.where(known, tl.sum(acc, 1), float("nan"))
    weight = tl.load(weights + pair)
    gated = tl.where(known & (weight == 0.0), 0.0, total * weight)
    out = pair.to(tl.int64) * rank + r
    tl.store(u + out, rounded(gated, u.dtype.element_ty, INTERPRET), mask=r < rank)
    tl.store(h + out, rounded(total, u.dtype.element_ty, INTERPRET), mask=r < rank)


@triton.jit
def _few_expand_kernel(
    u: tl.tensor,
    b: tl.tensor,
    ids: tl.tensor,
    base: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    E: tl.tensor,
    O: tl.tensor,  # noqa: E741 - the letter of the outputs
    rank: tl.tensor,
    base_row: tl.tensor,
    base_column: tl.tensor,
    SLOTS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R)
    column = tl.minimum(o, O - 1).to(tl.int64)
    acc = tl.zeros([BLOCK_O], tl.float32)
    for slot in range(SLOTS):
        pair = row * SLOTS + slot
        expert = tl.load(ids + pair)
        known = (expert >= 0) & (expert < E)
        for start in range(0, rank, BLOCK_R):
            live = known & (r < rank - start)
            middle = tl.load(u + pair * rank + start + r, mask=live, other=0.0).to(tl.float32)
            up = b + column[:, None] * (E * rank) + (expert * rank + start + r)[None, :]
            acc += tl.sum(tl.load(up, mask=live[None, :], other=0.0).to(tl.float32) * middle[None, :], 1)
        acc = tl.where(known, acc, float("nan"))
    acc *= scale
    if HAS_BASE:
        acc += tl.load(base + row * base_row + o * base_column, mask=o < O, other=0.0).to(tl.float32)
    tl.store(y + row * O + o, rounded(acc, y.dtype.element_ty, INTERPRET), mask=o < O)


@triton.jit
def _block_shrink_kernel(
    x: tl.tensor,
    a: tl.tensor,
    order: tl.tensor,
    table: tl.tensor,
    weights: tl.tensor,
    u: tl.tensor,
    h: tl.tensor,
    T: tl.tensor,
    E: tl.tensor,
    K: tl.tensor,
    rank: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    SLOTS: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    slot = tl.program_id(1)
    entry = table + (slot * tl.num_programs(0) + tl.program_id(0)) * 3
    expert = tl.load(entry)
    first = tl.load(entry + 1)
    last = tl.load(entry + 2)
    if first >= last:  # the table is longer than what these routes need
        return
    place = first + tl.arange(0, BLOCK_T)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    row = tl.load(order + slot * T + tl.minimum(place, last - 1)).to(tl.int64)
    down = tl.minimum(expert, E - 1).to(tl.int64) * rank + tl.minimum(r, rank - 1)
    left = x + row[:, None] * x_row + k[None, :] * x_column
    right = a + down[None, :] * K + k[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        part = tl.load(left, mask=k[None, :] < K - start, other=0.0)
        acc = dot(part, tl.load(right, mask=k[:, None] < K - start, other=0.0), acc, INTERPRET)
        left += BLOCK_K * x_column
        right += BLOCK_K
    known = expert < E
    acc = tl.where(known, acc, float("nan"))
    weight = tl.load(weights + row * SLOTS + slot)[:, None]
    gated = tl.where(known & (weight == 0.0), 0.0, acc * weight)
    out = (row * SLOTS + slot)[:, None] * rank + r[None, :]
    live = (place < last)[:, None] & (r < rank)[None, :]
    tl.store(u + out, rounded(gated, u.dtype.element_ty, INTERPRET), mask=live)
    tl.store(h + out, rounded(acc, u.dtype.element_ty, INTERPRET), mask=live)


@triton.jit
def _block_expand_kernel(
    u: tl.tensor,
    b: tl.tensor,
    order: tl.tensor,
    table: tl.tensor,
    base: tl.tensor,
    sums: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    slot: tl.tensor,
    T: tl.tensor,
    E: tl.tensor,
    O: tl.tensor,  # noqa: E741 - the letter of the outputs
    rank: tl.tensor,
    base_row: tl.tensor,
    base_column: tl.tensor,
    SLOTS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    HAS_BASE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    entry = table + (slot * tl.num_programs(0) + tl.program_id(0)) * 3
    expert = tl.load(entry)
    first = tl.load(entry + 1)
    last = tl.load(entry + 2)
    if first >= last:
        return
    place = first + tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R)
    row = tl.load(order + slot * T + tl.minimum(place, last - 1)).to(tl.int64)
    column = tl.minimum(o, O - 1).to(tl.int64)
    left = u + (row * SLOTS + slot)[:, None] * rank + r[None, :]
    right = b + column[None, :] * (E * rank) + (tl.minimum(expert, E - 1) * rank + r)[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for start in range(0, rank, BLOCK_R):
        part = tl.load(left + start, mask=r[None, :] < rank - start, other=0.0)
        acc = dot(part, tl.load(right + start, mask=r[:, None] < rank - start, other=0.0), acc, INTERPRET)
    acc = tl.where(expert < E, acc, float("nan"))
    out = row[:, None] * O + o[None, :]
    live = (place < last)[:, None] & (o < O)[None, :]
    if not FIRST:
        acc += tl.load(sums + out, mask=live, other=0.0)
    if LAST:
        acc *= scale
        if HAS_BASE:
            acc += tl.load(base + row[:, None] * base_row + o[None, :] * base_column, mask=live, other=0.0).to(
                tl.float32
            )
        tl.store(y + out, rounded(acc, y.dtype.element_ty, INTERPRET), mask=live)
    else:
        tl.store(sums + out, acc, mask=live)


def token_blocks(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """Sort the tokens of each slot by expert and cut them into blocks of one expert; no value comes back to the host.

    Args:
        ids: `[T, k]` int32.
        experts: E; ids outside [0, E) form the group E.
        block: tokens a block at most.

    Returns:
        order `[k, T]` int32, tokens by expert; table `[k, cdiv(T, block) + E + 1, 3]` int32, each row the expert and the
        part [first, last) of the order, which is empty in rows that are not needed.
    """
    group = ids.T.to(torch.int64).contiguous()  # what follows keeps the order of its dimensions
    group = torch.where((group >= 0) & (group < experts), group, experts)
    order = group.argsort(dim=1, stable=True)
    counts = (group[:, :, None] == torch.arange(experts + 1, device=ids.device)).sum(1)
    ends, blocks = counts.cumsum(1), (counts + block - 1) // block
    block_ends = blocks.cumsum(1)
    rows = triton.cdiv(group.shape[1], block) + experts + 1
    index = torch.arange(rows, device=ids.device).expand(len(group), rows).contiguous()
    owner = torch.searchsorted(block_ends, index, right=True)
    needed, owner = owner <= experts, owner.clamp_max(experts)
    first = (ends - counts).gather(1, owner) + (index - (block_ends - blocks).gather(1, owner)) * block
    last = torch.minimum(first + block, ends.gather(1, owner))
    table = torch.stack([owner, first.where(needed, 0), last.where(needed, 0)], 2)
    return order.to(torch.int32), table.to(torch.int32)


def shrink_gathered(x: Tensor, A: Tensor, ids: Tensor, weights: Tensor, few: bool) -> tuple[Tensor, Tensor]:
    """Launch the shrink: x `[T, in]` any strides; A `[E, r, in]`, ids and weights `[T, k]` contiguous; T >= 1.

    `few` chooses the form with a program a token. Returns u and h, `[T, k, r]` in x's dtype.
    """
    (tokens, width), (experts, rank, _), slots = x.shape, A.shape, ids.shape[1]
    u = torch.empty(tokens, slots, rank, dtype=x.dtype, device=x.device)
    h = torch.empty_like(u)
    sizes = block_sizes(
        "gathered_shrink", rank, width, x.dtype, tokens=tokens if few else max(tokens, FEW_TOKENS + 1), device=x.device
    )
    sizes |= {"BLOCK_R": inner_block(rank, sizes["BLOCK_R"]), "BLOCK_K": inner_block(width, sizes["BLOCK_K"])}
    block = sizes.pop("BLOCK_T")
    numbers = (experts, width, rank, *x.stride())
    with torch.cuda.device(x.device if x.is_cuda else -1):  # Triton launches on the current one
        if few:
            grid = (tokens * slots, triton.cdiv(rank, sizes["BLOCK_R"]))
            _few_shrink_kernel[grid](x, A, ids, weights, u, h, *numbers, SLOTS=slots, INTERPRET=INTERPRETED, **sizes)
            return u, h
        block = max(16, block)
        order, table = token_blocks(ids, experts, block)
        parts = (table.shape[1], slots, triton.cdiv(rank, sizes["BLOCK_R"]))
        flags = {"SLOTS": slots, "INTERPRET": INTERPRETED, "BLOCK_T": block}
        _block_shrink_kernel[parts](x, A, order, table, weights, u, h, tokens, *numbers, **flags, **sizes)
    return u, h


def expand_gathered(u: Tensor, B: Tensor, ids: Tensor, scale: float, base: Tensor | None, few: bool) -> Tensor:
    """Launch the expand: u `[T, k, r]`, B `[out, E*r]` and ids `[T, k]` contiguous; base `[T, out]` any strides; T >= 1.

    `few` chooses the form with a program a token. Returns `[T, out]` in u's dtype.
    """
    (tokens, slots, rank), width = u.shape, len(B)
    experts = B.shape[1] // rank
    y = torch.empty(tokens, width, dtype=u.dtype, device=u.device)
    sizes = block_sizes(
        "gathered_expand", rank, width, u.dtype, tokens=tokens if few else max(tokens, FEW_TOKENS + 1), device=u.device
    )
    sizes["BLOCK_R"] = inner_block(rank, sizes["BLOCK_R"])
    block, blocks_out = sizes.pop("BLOCK_T"), triton.cdiv(width, sizes["BLOCK_O"])
    flags = {"SLOTS": slots, "HAS_BASE": base is not None, "INTERPRET": INTERPRETED}
    base = y if base is None else base
    numbers = (experts, width, rank, *base.stride())
    with torch.cuda.device(u.device if u.is_cuda else -1):
        if few:
            _few_expand_kernel[(tokens, blocks_out)](u, B, ids, base, y, scale, *numbers, **flags, **sizes)
            return y
        flags["BLOCK_T"] = max(16, block)
        order, table = token_blocks(ids, experts, flags["BLOCK_T"])
        sums = torch.empty(tokens, width, dtype=torch.float32, device=u.device) if slots > 1 else y
        for slot in range(slots):
            ends = {"FIRST": slot == 0, "LAST": slot == slots - 1}
            arguments = (u, B, order, table, base, sums, y, scale, slot, tokens, *numbers)
            _block_expand_kernel[(table.shape[1], blocks_out)](*arguments, **ends, **flags, **sizes)
    return y
