"""Weights of a linear layer as kernels take them, and device functions that widen them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

# 128 (bf16) and 1024 (fp16) have steps of 1: or-ing a code into the last bits adds it. $0 and $1
# are the low nibbles of four bytes $4, $2 and $3 the high ones, less the zeros $5, which differ
# where a layout puts two rows into the four. A lop3 of 0xEA is (a & b) | c; prmt puts a byte into
# each half of a register.
_UNPACK = """{{
.reg .b32 first, second, zero_first, zero_second, one;
mov.b32 one, {one};
prmt.b32 first, $4, 0, 0x4140;
prmt.b32 second, $4, 0, 0x4342;
prmt.b32 zero_first, $5, 0, 0x4140;
prmt.b32 zero_second, $5, 0, 0x4342;
or.b32 zero_first, zero_first, {minus};
or.b32 zero_second, zero_second, {minus};
lop3.b32 $0, first, 0x000F000F, {magic}, 0xEA;
lop3.b32 $1, second, 0x000F000F, {magic}, 0xEA;
shr.u32 first, first, 4;
shr.u32 second, second, 4;
lop3.b32 $2, first, 0x000F000F, {magic}, 0xEA;
lop3.b32 $3, second, 0x000F000F, {magic}, 0xEA;
fma.rn.{kind} $0, $0, one, zero_first;
fma.rn.{kind} $1, $1, one, zero_second;
fma.rn.{kind} $2, $2, one, zero_first;
fma.rn.{kind} $3, $3, one, zero_second;
}}"""
REGISTERS = tl.constexpr("=r,=r,=r,=r,r,r")
# What nibbles without zeros of their own are less.
NIBBLE_ZERO = tl.constexpr(8)
UNPACK_BF16 = tl.constexpr(
    _UNPACK.format(kind="bf16x2", magic="0x43004300", minus="0xC300C300", one="0x3F803F80")
)
UNPACK_FP16 = tl.constexpr(
    _UNPACK.format(kind="f16x2", magic="0x64006400", minus="0xE400E400", one="0x3C003C00")
)


class Weights(NamedTuple):
    """Codes [N, K], or [N, K/2] of two nibbles a byte in blocks of `block` inputs; scale fp32
    [N], or [N, R] of groups, or None; zero uint8 [N, R] or None (8 for nibbles)."""

    codes: Tensor
    scale: Tensor | None = None
    zero_NR: Tensor | None = None
    block: int = 0

    @property
    def outputs(self) -> int:
        return self.codes.shape[0]

    @property
    def inputs(self) -> int:
        return self.codes.shape[1] * (2 if self.block else 1)

    @property
    def group(self) -> int:
        """Inputs of a scale; 0: one scale for all of a row, applied to its sum."""
        if self.scale is None or self.scale.dim() == 1:
            return 0
        return self.inputs // self.scale.shape[1]

    def rows(self, rows: slice) -> Weights:
        scale = None if self.scale is None else self.scale[rows]
        zero_NR = None if self.zero_NR is None else self.zero_NR[rows]
        return Weights(self.codes[rows], scale, zero_NR, self.block)


def bits_of(codes: Tensor) -> Tensor:
    """float8 as uint8: kernels take its bits."""
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


@jit
def unpack(codes, zero, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """uint8 → two tensors of `dtype` (fp16 or bf16), exact: low nibbles - zero, high - zero.

    `zero` is uint8 of the same shape, 0…16. The assembly takes two instructions a code, and none
    for a constant zero; the interpreter does not have it.
    """
    if ASSEMBLY:
        if dtype == tl.bfloat16:
            low, high = tl.inline_asm_elementwise(
                UNPACK_BF16, REGISTERS, [codes, zero], (tl.bfloat16, tl.bfloat16), True, 4
            )
        else:
            low, high = tl.inline_asm_elementwise(
                UNPACK_FP16, REGISTERS, [codes, zero], (tl.float16, tl.float16), True, 4
            )
    else:
        low = ((codes & 15).to(tl.int32) - zero.to(tl.int32)).to(tl.float32).to(dtype)
        high = ((codes >> 4).to(tl.int32) - zero.to(tl.int32)).to(tl.float32).to(dtype)
    return low, high
