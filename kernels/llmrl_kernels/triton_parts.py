"""Parts of the Triton kernels that differ between a GPU and Triton's interpreter, so that both give the same numbers."""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def rounded(x: tl.tensor, dtype: tl.constexpr, INTERPRET: tl.constexpr) -> tl.tensor:
    """Round float32 to `dtype`, to the nearest, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:  # the interpreter truncates: leave it nothing to cut off
        bits = x.to(tl.int32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, near, float("nan"))  # the bits of one could run over into the sign, or be cut to infinity
    return x.to(dtype)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor, INTERPRET: tl.constexpr) -> tl.tensor:
    """Return acc + a b, summed in float32."""
    if INTERPRET:  # its product of bfloat16 is of the bit patterns
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _probe() -> None:
    pass


INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 when triton was imported
TL_DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def inner_block(size: int, most: int) -> int:
    """Return the block of an inner dimension of a product: a power of two, at least the 16 that `tl.dot` asks for."""
    return max(16, min(most, triton.next_power_of_2(size)))
