"""Products of tokens with packed codes, and what a block does around them: products.h."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
# A token of smaller values loses bits.
MIN_TOKEN_RANGE = 1e-30

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class _Source(ctypes.Structure):
    _fields_ = (
        ("x", _POINTER),
        ("norm_weight", _POINTER),
        ("given_scale", _POINTER),
        ("count", _SIZE),
        ("inputs", _SIZE),
        ("groups", _SIZE),
        ("eps", ctypes.c_float),
        ("least_range", ctypes.c_float),
        ("dtype", ctypes.c_int),
    )


class _Target(ctypes.Structure):
    _fields_ = (
        ("y", _POINTER),
        ("residual", _POINTER),
        ("width", _SIZE),
        ("apart", _SIZE),
        ("dtype", ctypes.c_int),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        ("source", _Source),
        ("codes", _POINTER),
        ("scale", _POINTER),
        ("zero", _POINTER),
        ("target", _Target),
        ("is_scale_fp16", ctypes.c_int),
        ("digits", ctypes.c_int),
        ("threads", ctypes.c_int),
    )


@dataclass(frozen=True, eq=False)
class Packed:
    """Codes as their library packs them; scale [N/16, R, 16] fp16 or fp32, zero uint8 or None."""

    outputs: int
    inputs: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.scale.shape[1]


class PackedProduct:
    """x [T, K] → x @ wᵀ [T, N] in x's dtype; no result depends on the batch it is computed in.

    `digits` is by x's dtype. One digit is a rounding to int8, by `input_scale` fp32 [1] or by each
    token's range, which is taken as `least_range` at least.
    """

    def __init__(
        self,
        multiply: Callable[[object], None],
        packed: Packed,
        *,
        digits: Mapping[torch.dtype, int] = EXACT_DIGITS,
        input_scale: Tensor | None = None,
        least_range: float = MIN_TOKEN_RANGE,
    ):
        self._multiply, self._packed, self._digits = multiply, packed, digits
        self._input_scale, self._least_range = input_scale, least_range

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
        if norm is not None and (x_TK.shape[1] % LANES or norm[0].dtype != x_TK.dtype):
            return None
        if is_gated and self._packed.outputs % (2 * ROWS):
            return None
        if residual_TN is not None and residual_TN.dtype != x_TK.dtype:
            return None
        return self._run(x_TK, norm, is_gated, residual_TN)

    def _run(
        self,
        x_TK: Tensor,
        norm: tuple[Tensor, float] | None,
        is_gated: bool,
        residual_TN: Tensor | None,
    ) -> Tensor:
        packed, x_TK = self._packed, x_TK.contiguous()
        (count, inputs), dtype = x_TK.shape, _DTYPES[x_TK.dtype]
        assert inputs == packed.inputs
        width = packed.outputs // 2 if is_gated else packed.outputs
        y_TN = torch.empty(count, width, dtype=x_TK.dtype)
        norm_weight_K, eps = (None, 0.0) if norm is None else norm
        # Copies, where there are any, live until the call is over.
        around = [None if t is None else t.contiguous() for t in (norm_weight_K, residual_TN)]
        norm_weight, residual = map(_address, around)
        source = _Source(
            _address(x_TK), norm_weight, _address(self._input_scale),
            count, inputs, packed.groups, eps, self._least_range, dtype,
        )  # fmt: skip
        target = _Target(_address(y_TN), residual, width, width // ROWS if is_gated else 0, dtype)
        product = _Product(
            source, _address(packed.codes), _address(packed.scale), _address(packed.zero), target,
            packed.scale.dtype == torch.float16, self._digits[x_TK.dtype], torch.get_num_threads(),
        )  # fmt: skip
        self._multiply(ctypes.byref(product))
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
