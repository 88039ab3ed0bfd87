"""`switch_linear` for GPUs: the linear layer of a few tokens and its experts, in one launch or in two.

One launch (PHASE 0): the first tiles are rows of A, which leave u = g * (A x) in a scratch buffer; the others are rows of W,
which stream W, then wait for u, add B u and store once. Every program takes its tiles in ascending order, so no row of A is
behind a wait of its own program; that all programs are on the card at once is asserted on the host. Finished producers are
counted over all launches; who waits compares the count with where this launch began plus its producers. Where it began lies in
device memory, and the last program to finish moves it on: a replayed CUDA graph goes on from where it was, nothing is reset,
and layers of other sizes may take turns. THE WAIT HAS NOT RUN ON A GPU YET, nothing about it is measured, and nothing chooses
it by default. In the interpreter, where programs run one after the other, it runs with a single program.

Two launches (PHASE 1, then 2): the same tiles with the end of a launch in place of the wait.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmrl_kernels.triton_parts import INTERPRETED, dot, inner_block, rounded
from llmrl_kernels.tuning import block_sizes, processors

BLOCK_TOKENS = 16  # a token is a column of a product, and 16 columns are the least it takes
FUSED, SHRINK, EXPAND = 0, 1, 2


@triton.jit
def _project(
    x: tl.tensor,
    rows: tl.tensor,
    live: tl.tensor,
    T: tl.tensor,
    K: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    INTERPRET: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Return the products `[BLOCK, BLOCK_T]` of matrix rows, given by the addresses of their starts, with the tokens."""
    t = tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK, BLOCK_T], tl.float32)
    for start in range(0, K, BLOCK_K):
        column = start + k
        part = tl.load(rows[:, None] + column[None, :], mask=live[:, None] & (column < K)[None, :], other=0.0)
        token = tl.load(
            x + t.to(tl.int64)[None, :] * x_row + column[:, None] * x_column,
            mask=(column < K)[:, None] & (t < T)[None, :],
            other=0.0,
        )
        acc = dot(part, token, acc, INTERPRET)
    return acc


@triton.jit
def _switch_kernel(
    x: tl.tensor,
    w: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    gates: tl.tensor,
    bias: tl.tensor,
    u: tl.tensor,
    counters: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    T: tl.tensor,
    K: tl.tensor,
    O: tl.tensor,  # noqa: E741 - the letter of the outputs
    R: tl.tensor,
    rank: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    gate_row: tl.tensor,
    gate_column: tl.tensor,
    PHASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    dtype: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    producers = tl.cdiv(R, BLOCK_R)
    consumers = tl.cdiv(O, BLOCK_O)
    t = tl.arange(0, BLOCK_T)
    if PHASE == 0:
        begin = tl.load(counters + 1, volatile=True)  # moves on when all programs have finished, so not before this
    if PHASE != 2:
        for tile in range(program, producers, programs):
            c = tile * BLOCK_R + tl.arange(0, BLOCK_R)
            h = _project(x, a + c.to(tl.int64) * K, c < R, T, K, x_row, x_column, INTERPRET, BLOCK_R, BLOCK_T, BLOCK_K)
            live = (c < R)[:, None] & (t < T)[None, :]
            gate = tl.load(gates + t[None, :] * gate_row + (c // rank)[:, None] * gate_column, mask=live, other=0.0)
            # not 0 times h: an expert that is not chosen may hold anything
            tl.store(u + t[None, :] * R + c[:, None], tl.where(gate == 0.0, 0.0, h * gate), mask=live)
            if PHASE == 0:
                tl.debug_barrier()  # every thread's part of u, then the word that it is there
                tl.atomic_add(counters, 1, sem="release", scope="gpu")
    if PHASE != 1:
        first = program
        if PHASE == 0:  # tiles go on being dealt out where those of A ended
            first = (program - producers % programs + programs) % programs
        for tile in range(first, consumers, programs):
            o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
            acc = _project(
                x, w + o.to(tl.int64) * K, o < O, T, K, x_row, x_column, INTERPRET, BLOCK_O, BLOCK_T, BLOCK_K
            )
            if PHASE == 0:
                # the difference: the numbers wrap around in the end
                while tl.atomic_add(counters, 0, sem="acquire", scope="gpu") - begin < producers:
                    pass
            delta = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
            for start in range(0, R, BLOCK_E):
                j = start + tl.arange(0, BLOCK_E)
                up = tl.load(
                    b + o.to(tl.int64)[:, None] * R + j[None, :], mask=(o < O)[:, None] & (j < R)[None, :], other=0.0
                )
                middle = tl.load(  # from L2: another processor wrote it during this launch
                    u + t[None, :] * R + j[:, None],
                    mask=(j < R)[:, None] & (t < T)[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                delta = dot(up, rounded(middle, dtype, INTERPRET), delta, INTERPRET)
            acc += delta * scale
            if HAS_BIAS:
                acc += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
            live = (o < O)[:, None] & (t < T)[None, :]
            tl.store(y + t.to(tl.int64)[None, :] * O + o[:, None], rounded(acc, dtype, INTERPRET), mask=live)
    if PHASE == 0:
        tl.debug_barrier()
        if tl.atomic_add(counters + 2, 1, sem="acq_rel", scope="gpu") == programs - 1:
            tl.store(counters + 2, 0)
            tl.store(counters + 1, begin + producers)


def resident_programs(device: torch.device) -> int:
    """Return how many programs are sure to be on the card together: one a processor, whatever they need of it."""
    return processors(device)


def launch(
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    gates: Tensor,
    scale: float,
    bias: Tensor | None,
    u: Tensor,
    counters: Tensor,
    fused: bool,
    programs: int | None = None,
) -> Tensor:
    """Launch once (`fused`) or twice.

    Args:
        x: `[T, in]`, any strides, 1 <= T <= 16.
        W: `[out, in]`, contiguous as A `[E, r, in]`, B `[out, E*r]` and bias `[out]` or None; all in x's dtype.
        A: see W.
        B: see W.
        gates: `[T, E]` float32, any strides.
        scale: factor of the mixture.
        bias: see W.
        u: scratch, float32, at least T*E*r.
        counters: `[3]` int32: producers that have finished in all launches, how many before this one, programs that have
            finished in this one.
        fused: whether in one launch.
        programs: of a launch; None chooses. More than fit on the card at once are refused for a fused launch: they would wait
            for ever for those that cannot start.

    Returns:
        `[T, out]` in x's dtype.

    Raises:
        ValueError: a fused launch of too many programs.
    """
    (tokens, width), (experts, rank, _), out = x.shape, A.shape, len(W)
    sizes = block_sizes("switch_linear", experts * rank, width, out, x.dtype, tokens=tokens, device=x.device)
    sizes |= {"BLOCK_K": inner_block(width, sizes["BLOCK_K"]), "BLOCK_E": inner_block(experts * rank, 64)}
    tiles = triton.cdiv(experts * rank, sizes["BLOCK_R"]), triton.cdiv(out, sizes["BLOCK_O"])
    capacity = resident_programs(x.device)
    y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    tensors = (x, W, A, B, gates, y if bias is None else bias, u, counters, y)
    numbers = (float(scale), tokens, width, out, experts * rank, rank, *x.stride(), *gates.stride())
    flags = {"HAS_BIAS": bias is not None, "INTERPRET": INTERPRETED, "BLOCK_T": BLOCK_TOKENS}
    if fused:
        programs = min(sum(tiles), capacity) if programs is None else programs
        if programs > capacity:
            raise ValueError(
                f"programs: expected at most {capacity}, as many as fit on the card at once, got {programs}"
            )
    with torch.cuda.device(x.device if x.is_cuda else -1):  # Triton launches on the current one
        for phase in (FUSED,) if fused else (SHRINK, EXPAND):
            grid = (programs or tiles[phase - 1],)
            _switch_kernel[grid](*tensors, *numbers, PHASE=phase, **flags, **sizes)
    return y
