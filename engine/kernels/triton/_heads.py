"""Device functions on the heads of one token: rotation, and the way to their place in the cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._codes import encode

WARPS = 2
# A rotation rounds as two products and a sum do in PyTorch: the cache's codes are the same.
ROUNDS_EACH = {"num_warps": WARPS, "enable_fp_fusion": False}


def is_row_of_heads(x_THD: Tensor) -> bool:
    """Whether a token's heads are one contiguous [H, D], as they are in a fused projection."""
    return x_THD.stride(2) == 1 and x_THD.stride(1) == x_THD.shape[2]


@triton.jit
def turn(low, high, cos, sin, dtype: tl.constexpr):
    """Two halves of heads rotated, in fp32, and rounded to `dtype`."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    return (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)


@triton.jit
def rotate(out, x, cos, sin, heads, HEADS: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr):
    """Rotate `heads` heads [heads, 2 HALF] at x into out; cos and sin are fp32 [HALF]."""
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, C)[None, :]
    at = head * (2 * HALF) + channel
    inside = (head < heads) & (channel < HALF)
    low = tl.load(x + at, mask=inside, other=0.0)  # [HEADS, C]
    high = tl.load(x + at + HALF, mask=inside, other=0.0)
    cosine = tl.load(cos + channel, mask=channel < HALF, other=0.0)  # [1, C]
    sine = tl.load(sin + channel, mask=channel < HALF, other=0.0)
    low, high = turn(low, high, cosine, sine, out.dtype.element_ty)
    tl.store(out + at, low, mask=inside)
    tl.store(out + at + HALF, high, mask=inside)


@triton.jit
def store_rotated(out, x, cos, sin, scale, keep, HALF: tl.constexpr, C: tl.constexpr):
    """Rotate one key of 2 HALF channels and store it where `keep`, as the cache stores it."""
    channel = tl.arange(0, C)
    inside = channel < HALF
    low = tl.load(x + channel, mask=inside, other=0.0)  # [C]
    high = tl.load(x + channel + HALF, mask=inside, other=0.0)
    cosine = tl.load(cos + channel, mask=inside, other=0.0)
    sine = tl.load(sin + channel, mask=inside, other=0.0)
    # Codes are made of what an unquantised cache would hold.
    low, high = turn(low, high, cosine, sine, x.dtype.element_ty)
    kind = out.dtype.element_ty
    tl.store(out + channel, encode(low.to(tl.float32), scale, kind), mask=inside & keep)
    tl.store(out + channel + HALF, encode(high.to(tl.float32), scale, kind), mask=inside & keep)


@triton.jit
def store_head(out, x, scale, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store one key or value of D channels where `keep`, as the cache stores it."""
    channel = tl.arange(0, BLOCK_D)
    inside = channel < D
    value = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + channel, encode(value, scale, kind), mask=inside & keep)


@triton.jit
def slot_offset(slot, head, block_tokens, block_stride, head_stride, D: tl.constexpr):
    """Where the cache keeps the head's position `slot` (int64); anywhere for a negative slot."""
    slot = tl.maximum(slot, 0)
    block = slot // block_tokens
    return block * block_stride + head * head_stride + (slot - block * block_tokens) * D


@triton.jit
def scale_of(scales, head):
    """The cache's scale of one head; 1 where the cache has none."""
    return 1.0 if scales is None else tl.load(scales + head)
