"""What the kernels with an RMSNorm share: the arithmetic of a row, and its block and warps."""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

# Widest row that one program holds in registers.
MAX_WIDTH = 2**15
ELEMENTS_PER_WARP = 512
MAX_WARPS = 16


@cache
def row_block(width: int) -> tuple[int, int]:
    """Block size and warps of a program that holds a row of `width` elements."""
    assert width <= MAX_WIDTH, f"a row of {width} elements does not fit one program"
    block = triton.next_power_of_2(width)
    return block, max(1, min(MAX_WARPS, block // ELEMENTS_PER_WARP))


@triton.jit
def normalise(x, weight, width, eps, dtype: tl.constexpr):
    """A row x fp32 [BLOCK], zero past `width`: rounded to `dtype` before the weight multiplies it,
    and after. A product of two 16-bit numbers is exact in fp32."""
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    rounded = (x * scale).to(dtype).to(tl.float32)
    return (rounded * weight.to(tl.float32)).to(dtype)
