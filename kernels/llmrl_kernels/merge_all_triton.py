"""`MergePlan.merge` for GPUs: every item in one launch of a fixed number of programs.

A program strides over the tiles of all items, finds a tile's item by binary search, and reads the item's addresses from a table
on the device. Route, table and marks lie at fixed addresses, so the launch can be captured in a CUDA graph and replayed.

Whether the route changed is decided by each program for itself: it keeps the route it last applied in a row that no other
program touches. One flag for all would be read by some programs after others had set it. That row is also what the update in
place takes out again (`InPlacePlan`): new experts minus those of the row, in the same pass over the weights.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmrl_kernels.triton_parts import INTERPRETED, TL_DTYPES, inner_block, rounded
from llmrl_kernels.tuning import block_sizes


@triton.jit
def _item_of(tile: tl.tensor, shapes: tl.tensor, items: tl.tensor, STEPS: tl.constexpr) -> tl.tensor:
    """Return the last item whose first tile is not after `tile`."""
    low = tile * 0
    high = low + items
    for _ in range(STEPS):
        middle = (low + high) // 2
        here = tl.load(shapes + middle * 4 + 3) <= tile
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    return low


@triton.jit
def _product(up: tl.tensor, down: tl.tensor, acc: tl.tensor, INTERPRET: tl.constexpr) -> tl.tensor:
    """Return acc + up down, summed in float32, on tensor cores in every dtype.

    Float32 is split into a leading and a trailing part of 11 bits each, and the products of two trailing parts are left out:
    at most 2^-20 of a product is lost, where one pass of TF32 would lose 2^-10 and "ieee" would use no tensor core. Numbers
    of up to 11 bits lose nothing.
    """
    if INTERPRET:  # its product of bfloat16 is of the bit patterns
        up = up.to(tl.float32)
        down = down.to(tl.float32)
    return tl.dot(up, down, acc, input_precision="tf32x3")


@triton.jit
def _add_experts(
    total: tl.tensor,
    sign: tl.constexpr,
    a: tl.tensor,
    b: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    rank: tl.tensor,
    experts: tl.tensor,
    TOP_K: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> tl.tensor:
    """Return total + sign * sum_k g_k B[:, e_k] A[e_k] of a tile in float32; NaN where an id is no expert's."""
    r = tl.arange(0, BLOCK_R)
    for slot in range(TOP_K):
        expert = tl.load(ids + slot)
        weight = tl.load(weights + slot)
        known = (expert >= 0) & (expert < experts)
        read = known & (weight != 0.0)  # a weight of 0 is no product with what may be NaN
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, rank, BLOCK_R):
            j = start + r
            live = read & (j < rank)
            place = expert.to(tl.int64) * rank + j
            up = tl.load(
                b + rows.to(tl.int64)[:, None] * (experts * rank) + place[None, :],
                mask=live[None, :] & (rows < M)[:, None],
                other=0.0,
            )
            down = tl.load(
                a + place[:, None] * N + columns[None, :], mask=live[:, None] & (columns < N)[None, :], other=0.0
            )
            acc = _product(up, down, acc, INTERPRET)
        total += tl.where(known, acc * (sign * weight), float("nan"))
    return total


@triton.jit
def _merge_kernel(
    pointers: tl.tensor,
    shapes: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    marks: tl.tensor,
    scale: tl.tensor,
    items: tl.tensor,
    tiles: tl.tensor,
    experts: tl.tensor,
    BASE: tl.constexpr,
    OUT: tl.constexpr,
    LORA: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    TOP_K: tl.constexpr,
    STEPS: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    own = marks + tl.program_id(0) * (1 + 2 * TOP_K)
    same = tl.load(own) == 1
    for slot in range(TOP_K):
        same = same & (tl.load(own + 1 + slot) == tl.load(ids + slot))
        # the bits: a NaN is the NaN it was
        same = same & (tl.load(own + 1 + TOP_K + slot) == tl.load(weights + slot).to(tl.int32, bitcast=True))
    for tile in range(tl.program_id(0), tl.where(same, 0, tiles), tl.num_programs(0)):
        item = _item_of(tile, shapes, items, STEPS)
        M = tl.load(shapes + item * 4)
        N = tl.load(shapes + item * 4 + 1)
        rank = tl.multiple_of(tl.load(shapes + item * 4 + 2), RANK_MULTIPLE)
        base = tl.load(pointers + item * 4).to(tl.pointer_type(BASE))
        out = tl.load(pointers + item * 4 + 1).to(tl.pointer_type(OUT))
        a = tl.load(pointers + item * 4 + 2).to(tl.pointer_type(LORA))
        b = tl.load(pointers + item * 4 + 3).to(tl.pointer_type(LORA))
        if ALIGNED:  # what the compiler knows of an argument and cannot know of a loaded number
            N = tl.multiple_of(N, 16)
            base = tl.multiple_of(base, 16)
            out = tl.multiple_of(out, 16)
            a = tl.multiple_of(a, 16)
            b = tl.multiple_of(b, 16)
        within = tile - tl.load(shapes + item * 4 + 3)
        across = tl.cdiv(N, BLOCK_N)
        rows = within // across * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = within % across * BLOCK_N + tl.arange(0, BLOCK_N)
        delta = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if IN_PLACE:  # a row that is 0 weighs nothing, so nothing is taken out
            old = (own + 1 + TOP_K).to(tl.pointer_type(tl.float32), bitcast=True)
            delta = _add_experts(
                delta, -1.0, a, b, own + 1, old, rows, columns, M, N, rank, experts,
                TOP_K, INTERPRET, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        delta = scale * _add_experts(
            delta, 1.0, a, b, ids, weights, rows, columns, M, N, rank, experts,
            TOP_K, INTERPRET, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        place = rows.to(tl.int64)[:, None] * N + columns[None, :]
        live = (rows < M)[:, None] & (columns < N)[None, :]
        clean = tl.load(base + place, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
        merged = tl.where(delta == 0.0, clean, clean + delta)  # -0.0 + 0.0 would be 0.0
        tl.store(out + place, rounded(merged, OUT, INTERPRET), mask=live, eviction_policy="evict_first")
    tl.debug_barrier()  # no thread reads the mark after another has set it
    tl.store(own, 1)
    for slot in range(TOP_K):
        tl.store(own + 1 + slot, tl.load(ids + slot))
        tl.store(own + 1 + TOP_K + slot, tl.load(weights + slot).to(tl.int32, bitcast=True))


class Launch:
    """A launch of the merge, settled but for the route.

    Args:
        pointers: `[n, 4]` addresses of base, out, A and B of each item.
        shapes: `[n, 3]` M, N and r of each item.
        dtypes: of base, of out, and of A and B.
        experts: E.
        top_k: k.
        scale: factor of the delta.
        device: of everything.
        in_place: add to base, which is out, and take out what was added last.
    """

    def __init__(
        self,
        pointers: list[tuple[int, ...]],
        shapes: list[tuple[int, int, int]],
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
        experts: int,
        top_k: int,
        scale: float,
        device: torch.device,
        *,
        in_place: bool = False,
    ) -> None:
        rank = max(shape[2] for shape in shapes)
        # k and the dtype of A and B: they settle how much a tile computes beside the bytes that it moves
        self._sizes = block_sizes("merge_all", rank, top_k, dtypes[2], dtypes[1], device=device)
        occupancy = self._sizes.pop("OCCUPANCY")
        # 32 of float32: both of its parts in memory leave room for a second program
        self._sizes["BLOCK_R"] = inner_block(rank, 128 // dtypes[2].itemsize)
        rows, first = [], 0
        for M, N, r in shapes:
            rows.append((M, N, r, first))
            first += triton.cdiv(M, self._sizes["BLOCK_M"]) * triton.cdiv(N, self._sizes["BLOCK_N"])
        if first + 2**20 > 2**31:  # a program's next tile has to fit too
            raise ValueError(
                f"expected fewer than {2**31 - 2**20} tiles, got {first}: split the items over several plans"
            )
        self._device, self._tiles, self._top_k = device, first, top_k
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self._grid = (min(first, processors * occupancy),)
        aligned = all(address % 16 == 0 for row in pointers for address in row) and all(s[1] % 16 == 0 for s in shapes)
        self._tables = (
            torch.tensor(pointers, dtype=torch.int64, device=device),
            torch.tensor(rows, dtype=torch.int32, device=device),
        )
        self._marks = torch.zeros(self._grid[0], 1 + 2 * top_k, dtype=torch.int32, device=device)
        self._numbers = (float(scale), len(rows), self._tiles, experts)
        self._flags = dict(zip(("BASE", "OUT", "LORA"), (TL_DTYPES[dtype] for dtype in dtypes), strict=True))
        self._flags["RANK_MULTIPLE"] = math.gcd(16, *(shape[2] for shape in shapes))
        self._flags |= {
            "IN_PLACE": in_place,
            "ALIGNED": aligned,
            "TOP_K": top_k,
            "STEPS": len(rows).bit_length(),
            "INTERPRET": INTERPRETED,
        }

    @property
    def tiles(self) -> int:
        """How many tiles all items have."""
        return self._tiles

    @property
    def programs(self) -> int:
        """How many programs share them."""
        return self._grid[0]

    def applied(self) -> tuple[list[int], list[float]] | None:
        """Return ids and weights of the last launch; None before any. Waits for the device."""
        row = self._marks[0].cpu()
        ids, weights = row[1 : 1 + self._top_k], row[1 + self._top_k :].view(torch.float32)
        return (ids.tolist(), weights.tolist()) if row[0] else None

    def invalidate(self) -> None:
        """Forget what each program last applied."""
        self._marks.zero_()

    def __call__(self, ids: Tensor, weights: Tensor) -> None:
        """Merge for ids `[k]` int32 and weights `[k]` float32, contiguous and on the device."""
        with torch.cuda.device(self._device if self._device.type == "cuda" else -1):
            _merge_kernel[self._grid](
                *self._tables, ids, weights, self._marks, *self._numbers, **self._flags, **self._sizes
            )
