"""Linear layers with 4-bit weights on CPUs: by the own kernel where it can be compiled, else by
PyTorch's operations, which round to bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import env
from engine.kernels import packing, quantized_reference
from engine.kernels.native import compiled, int4
from engine.kernels.native.product import EXACT_DIGITS
from engine.kernels.packing import Packing, start
from engine.kernels.quantized_reference import (
    INT4_ZERO,
    NIBBLE_BLOCK,
    row_blocks,
    unpack_nibbles,
)

# Group sizes that PyTorch's int4 operation takes, a divisor of its outputs, and its interleaving.
INT4_GROUPS = (256, 128, 64, 32)
INT4_OUTPUTS = 16
INT4_ROW_BLOCK = 64
# From this many tokens on, widening the weights for oneDNN is faster than that operation.
INT4_TOKENS = 48

# Digits of a prompt that is rounded to 8 bits, by the range of each of the weights' groups: 1.8
# times as fast as an exact one, and nothing that fp32 engines should do.
ROUNDED_DIGITS = {**EXACT_DIGITS, torch.float16: 1, torch.bfloat16: 1}


def bind_rows(codes_NB: Tensor, scale_N: Tensor) -> Callable[[Tensor], Tensor]:
    """`linear_int4` with these weights."""
    library = compiled.load("int4")
    if library is None:
        return TorchInt4Rows(codes_NB, scale_N)
    return Packing(int4.pack, library, codes_NB, scale_N[:, None], None, NIBBLE_BLOCK)


def bind_groups(
    codes_NB: Tensor, scale_NR: Tensor, zero_NR: Tensor | None, block: int
) -> Callable[[Tensor], Tensor]:
    """`linear_int4_groups` with these weights."""
    library = compiled.load("int4")
    if library is None:
        return TorchInt4Groups(codes_NB, scale_NR, zero_NR, block)
    prompt_digits = ROUNDED_DIGITS if env.rounds_int4_prompts() else EXACT_DIGITS
    return Packing(int4.pack, library, codes_NB, scale_NR, zero_NR, block, prompt_digits)


class TorchInt4Rows:
    """bf16 products with the codes, which bf16 holds exactly; fp32 ones for fp32 tokens."""

    def __init__(self, codes_NB: Tensor, scale_N: Tensor):
        inputs = 2 * codes_NB.shape[1]
        group = next(size for size in INT4_GROUPS if inputs % size == 0)
        self._product = _TorchProduct(codes_NB, None, None, NIBBLE_BLOCK, group)
        self._codes_NB, self._scale_N = codes_NB, scale_N

    def __call__(self, x_TK: Tensor) -> Tensor:
        if x_TK.dtype == torch.float32:
            return quantized_reference.linear_int4(x_TK, self._codes_NB, self._scale_N)
        return (self._product(x_TK.bfloat16()) * self._scale_N).to(x_TK.dtype)


class TorchInt4Groups:
    """bf16 products: the weights are rounded to bf16 for many tokens, scales and offsets for few.

    Engines with fp32 scales are fp32 ones and round nothing.
    """

    def __init__(
        self, codes_NB: Tensor, scale_NR: Tensor, zero_NR: Tensor | None, block: int
    ) -> None:
        self._weights = (codes_NB, scale_NR, zero_NR, block)
        group = 2 * codes_NB.shape[1] // scale_NR.shape[1]
        self._product = None
        if scale_NR.dtype != torch.float32:
            self._product = _TorchProduct(codes_NB, scale_NR, zero_NR, block, group)

    def __call__(self, x_TK: Tensor) -> Tensor:
        if self._product is None or x_TK.dtype == torch.float32:
            return quantized_reference.linear_int4_groups(x_TK, *self._weights)
        return self._product(x_TK.bfloat16()).to(x_TK.dtype)


class _TorchProduct:
    """bf16 tokens times (codes - zero) · scale; a missing zero is 8, a missing scale 1."""

    def __init__(
        self,
        codes_NB: Tensor,
        scale_NR: Tensor | None,
        zero_NR: Tensor | None,
        block: int,
        group: int,
    ):
        self._codes_NB, self._scale_NR, self._zero_NR = codes_NB, scale_NR, zero_NR
        self._block, self._group = block, group
        self._packed: Future[tuple[Tensor, Tensor]] | None = None
        if group in INT4_GROUPS and len(codes_NB) % INT4_OUTPUTS == 0:
            self._packed = start(_pack_int4, codes_NB, scale_NR, zero_NR, block, group)

    def __call__(self, x_TK: Tensor) -> Tensor:
        if self._packed is not None and 0 < len(x_TK) < INT4_TOKENS:
            codes, scales = self._packed.result()
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x_TK, codes, self._group, scales)
        blocks = row_blocks(self._codes_NB, x_TK.shape[1], packing.BLOCK_WEIGHTS)
        return torch.cat([F.linear(x_TK, self._widen(rows)) for rows in blocks], dim=1)

    def _widen(self, rows: slice) -> Tensor:
        """bf16 [rows, K]. Operands of one dtype: PyTorch is many times slower with mixed ones."""
        codes_NK = unpack_nibbles(self._codes_NB[rows], self._block).view(torch.int8)
        if self._zero_NR is None:
            codes_NK -= INT4_ZERO
        else:
            codes_NK.unflatten(1, (-1, self._group)).sub_(
                self._zero_NR[rows, :, None].to(torch.int8)
            )
        w_NK = codes_NK.to(torch.bfloat16)
        if self._scale_NR is not None:
            scale_NR1 = self._scale_NR[rows, :, None].to(torch.bfloat16)
            w_NK.unflatten(1, (-1, self._group)).mul_(scale_NR1)
        return w_NK


def _pack_int4(
    codes_NB: Tensor, scale_NR: Tensor | None, zero_NR: Tensor | None, block: int, group: int
) -> tuple[Tensor, Tensor]:
    """What PyTorch's operation takes: codes, and bf16 [R, N, 2] of scale and offset for
    (code - 8) · scale + offset."""
    packed_NB = torch.empty_like(codes_NB)
    inputs = 2 * codes_NB.shape[1]
    rows = max(INT4_ROW_BLOCK, packing.BLOCK_WEIGHTS // inputs // INT4_ROW_BLOCK * INT4_ROW_BLOCK)
    for target, part in zip(packed_NB.split(rows), codes_NB.split(rows), strict=True):
        words_NK = unpack_nibbles(part, block).to(torch.int32)
        target.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(words_NK, 2))
    scales_RN2 = torch.zeros(inputs // group, len(codes_NB), 2, dtype=torch.bfloat16)
    scales_RN2[..., 0] = 1 if scale_NR is None else scale_NR.T
    if zero_NR is not None:
        assert scale_NR is not None
        scales_RN2[..., 1] = ((INT4_ZERO - zero_NR.float()) * scale_NR).T
    return packed_NB, scales_RN2
