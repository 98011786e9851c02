"""Device functions of an 8-bit key/value cache: codes to numbers and numbers to codes.

A code's element type says which: int8, or uint8 for the bits of a float8_e4m3fn. They are plain
arithmetic on bits, exact, and the same on every GPU: Ampere has no float8 conversions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._launch import capability

# Adding 1.5 * 2^23 to a small fp32 leaves no bits for fractions: the sum is rounded half to even.
ROUNDER = tl.constexpr(12582912.0)
# The bits of 2^23, whose mantissa counts ones; 128 more undo the offset of a shifted int8.
COUNTER_BITS = tl.constexpr(0x4B000000)
COUNTER_AND_OFFSET = tl.constexpr(8388608.0 + 128.0)
# float8_e4m3fn has exponents 120 lower than fp32's bias, 20 mantissa bits fewer, a smallest
# normal number of 2^-6 and steps of 2^-9 below.
E4M3_BIAS = tl.constexpr(120)
E4M3_SCALE = tl.constexpr(2.0**120)
E4M3_MAX = tl.constexpr(448.0)
E4M3_MIN_NORMAL = tl.constexpr(2.0**-6)
E4M3_STEPS = tl.constexpr(2.0**9)
# Far beyond what any code saturates at.
MAX_QUOTIENT = tl.constexpr(2.0**100)


def stored(cache: Tensor) -> Tensor:
    """The cache as kernels take it: float8 as uint8."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def has_float8(device: torch.device) -> bool:
    """Whether the device converts float8_e4m3fn by instructions (Ada and later)."""
    return device.type == "cpu" or capability(device) >= (8, 9)


@triton.jit
def decode(codes, dtype: tl.constexpr, FLOAT8: tl.constexpr):
    """Codes as `dtype`, scale left out; numbers of an unquantised cache stay what they are."""
    if codes.dtype == tl.int8:
        # Integer-to-float conversions are slow instructions; an addition is not.
        bits = (codes.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.int32) | COUNTER_BITS
        numbers = (bits.to(tl.float32, bitcast=True) - COUNTER_AND_OFFSET).to(dtype)
    elif codes.dtype == tl.uint8:
        if FLOAT8:
            # By way of fp32: fp16 to bf16 is a slow instruction, fp32 to either is not.
            halves = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
            numbers = halves.to(tl.float32).to(dtype)
        else:
            wide = codes.to(tl.int32)
            bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
            numbers = (bits.to(tl.float32, bitcast=True) * E4M3_SCALE).to(dtype)
    else:
        numbers = codes
    return numbers


@triton.jit
def encode(x, scale, dtype: tl.constexpr, FLOAT8: tl.constexpr = False):
    """fp32 x / scale as codes of `dtype`, rounded half to even and saturating; other dtypes take
    x itself. With FLOAT8 float8 is rounded by its instruction (sm_89 and later), which
    saturates."""
    if dtype == tl.int8:
        quotient = tl.minimum(tl.maximum(divide(x, scale), -127.0), 127.0)
        # Its last bits are the rounded number's: an addition is faster than a conversion.
        codes = (quotient + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    elif dtype == tl.uint8:
        quotient = divide(x, scale)
        if FLOAT8:
            codes = quotient.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            codes = _encode_e4m3(quotient)
    else:
        codes = x.to(dtype)
    return codes


@triton.jit
def divide(x, scale):
    """x / scale, rounded to nearest; `scale` is a scalar."""
    return divide_by(x, scale, tl.div_rn(tl.full([], 1.0, tl.float32), scale))


@triton.jit
def divide_by(x, scale, inverse):
    """x / scale by 1 / scale: one division for all of x, and a step of Newton's method each
    (Markstein 1990), from a finite quotient even of an infinity."""
    quotient = tl.minimum(tl.maximum(x * inverse, -MAX_QUOTIENT), MAX_QUOTIENT)
    return tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)


@triton.jit
def _encode_e4m3(x):
    size = tl.minimum(tl.abs(x), E4M3_MAX)
    bits = size.to(tl.int32, bitcast=True)
    # Half to even at bit 20: half a unit less one, and one more where the kept part is odd.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - E4M3_BIAS * 8
    small = ((size * E4M3_STEPS + ROUNDER) - ROUNDER).to(tl.int32)
    code = tl.where(size < E4M3_MIN_NORMAL, small, normal)
    return tl.where(x < 0, code | 0x80, code).to(tl.uint8)
