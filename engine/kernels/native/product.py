"""Products of tokens with packed codes, and what a block does around them: products.h."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a block of the packed layout.
ROWS = 16
# Norms are computed in whole vectors.
LANES = 16
# Int8 digits that a token is written with: 31 bits below its largest value, or 15, whose error is
# below a 16-bit type's own rounding of the product even if one value of the token outweighs all
# others.
EXACT_DIGITS: Mapping[torch.dtype, int] = {
    torch.float32: 4,
    torch.float16: 2,
    torch.bfloat16: 2,
}
# From this many tokens on, the time is that of byte products, not of memory.
PROMPT_TOKENS = 16
# A token of smaller values loses bits.
MIN_TOKEN_RANGE = 1e-30

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


# matrix, x, norm weight, eps, residual, y, tokens, dtype, digits, is_gated, threads
_ARGUMENTS = (
    *(_POINTER, _POINTER, _POINTER, ctypes.c_float, _POINTER, _POINTER, _SIZE),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int),
)


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("codes", _POINTER),
        ("scale", _POINTER),
        ("zero", _POINTER),
        ("multiplier", _POINTER),
        ("divisor", _POINTER),
        ("given_scale", _POINTER),
        ("outputs", _SIZE),
        ("inputs", _SIZE),
        ("groups", _SIZE),
        ("least_range", ctypes.c_float),
    )


class Packed(NamedTuple):
    """Codes as their library packs them; scale [N/16, R, 16] fp16 or fp32, zero uint8 or None."""

    outputs: int
    inputs: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


class PackedProduct:
    """x [T, K] → x @ wᵀ [T, N] in x's dtype.

    `digits` is by x's dtype. One digit is a rounding to int8, by `input_scale` fp32 [1] or by each
    token's range, group by group, which is taken as `least_range` at least. From PROMPT_TOKENS
    tokens on `prompt_digits` counts instead; without it no result depends on its batch.
    """

    def __init__(
        self,
        multiply: Any,
        packed: Packed,
        *,
        digits: Mapping[torch.dtype, int] = EXACT_DIGITS,
        prompt_digits: Mapping[torch.dtype, int] | None = None,
        input_scale: Tensor | None = None,
        least_range: float = MIN_TOKEN_RANGE,
    ):
        multiply.argtypes = _ARGUMENTS
        self._multiply, self._digits = multiply, digits
        self._prompt_digits = prompt_digits or digits
        self.outputs, self.inputs = packed.outputs, packed.inputs
        # What the kernel has addresses of lives as long as this.
        self._arrays = (packed.codes, packed.scale, packed.zero, None, None, input_scale)
        self._factors: tuple[Tensor, ...] = ()
        sizes = (packed.outputs, packed.inputs, packed.scale.shape[1])
        self._matrix = _Matrix(*map(_address, self._arrays), *sizes, least_range)
        self._matrix_address = ctypes.addressof(self._matrix)

    def multiply_by(self, factor_K: Tensor) -> None:
        """Tokens are multiplied by fp32 [K] and rounded to their dtype, before all else."""
        self._factors += (factor_K.float().contiguous(),)
        self._matrix.multiplier = self._factors[-1].data_ptr()

    def divide_by(self, divisor_K: Tensor) -> None:
        """Tokens are divided by fp32 [K], which is not rounded before they become digits."""
        self._factors += (divisor_K.float().contiguous(),)
        self._matrix.divisor = self._factors[-1].data_ptr()

    def __call__(self, x_TK: Tensor) -> Tensor:
        return self._run(x_TK, None, False, None)

    def fused(
        self,
        x_TK: Tensor,
        *,
        norm: tuple[Tensor, float] | None = None,
        is_gated: bool = False,
        residual_TN: Tensor | None = None,
    ) -> Tensor | None:
        """The product of RMSNorm's result, halved by SwiGLU, added to the residual; None for
        widths and dtypes that the kernel does not take."""
        if not self.fuses(None if norm is None else norm[0], x_TK.dtype, is_gated=is_gated):
            return None
        if residual_TN is not None and residual_TN.dtype != x_TK.dtype:
            return None
        return self._run(x_TK, norm, is_gated, residual_TN)

    def fuses(self, norm_K: Tensor | None, dtype: torch.dtype, *, is_gated: bool) -> bool:
        """Whether the kernel has the norm and the gate for tokens of `dtype`."""
        if norm_K is not None and (self.inputs % LANES or norm_K.dtype != dtype):
            return False
        return not (is_gated and self.outputs % (2 * ROWS))

    def native_call(self, dtype: torch.dtype) -> tuple[int | None, int, int]:
        """Addresses of the kernel and of its matrix, and the digits of a few tokens of `dtype`."""
        kernel = ctypes.cast(self._multiply, _POINTER).value
        return kernel, self._matrix_address, self._digits[dtype]

    def _run(
        self,
        x_TK: Tensor,
        norm: tuple[Tensor, float] | None,
        is_gated: bool,
        residual_TN: Tensor | None,
    ) -> Tensor:
        assert x_TK.shape[1] == self.inputs
        x_TK, dtype = x_TK.contiguous(), x_TK.dtype
        width = self.outputs // 2 if is_gated else self.outputs
        y_TN = torch.empty(len(x_TK), width, dtype=dtype)
        digits = self._digits if len(x_TK) < PROMPT_TOKENS else self._prompt_digits
        weight_K, eps = (None, 0.0) if norm is None else norm
        # Where it is a copy, it lives until the call is over.
        residual_TN = None if residual_TN is None else residual_TN.contiguous()
        self._multiply(
            self._matrix_address,
            x_TK.data_ptr(),
            _address(weight_K),
            eps,
            _address(residual_TN),
            y_TN.data_ptr(),
            len(x_TK),
            DTYPES[dtype],
            digits[dtype],
            is_gated,
            torch.get_num_threads(),
        )
        return y_TN


def in_blocks(of_NR: Tensor) -> Tensor:
    """[N, R] → [N / 16, R, 16], the last block filled up with zeros."""
    padded = F.pad(of_NR, (0, 0, 0, -len(of_NR) % ROWS))
    return padded.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()


def blocks_of_rows(outputs: int, row_bytes: int) -> Tensor:
    """Room for packed codes of whole blocks of rows, zeros where no row is."""
    packed = torch.empty(-(-outputs // ROWS) * ROWS, row_bytes, dtype=torch.uint8)
    packed[outputs // ROWS * ROWS :] = 0
    return packed


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
