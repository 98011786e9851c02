"""Linear layers with 8-bit weights on CPUs: by the own kernel where it can be compiled, else by
PyTorch's integer products.

Sums of the products of codes are exact, and no result depends on the batch it is computed in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.kernels.cpu_integer import pack_product
from engine.kernels.native import compiled, int8
from engine.kernels.native.product import EXACT_DIGITS, MIN_TOKEN_RANGE
from engine.kernels.packing import Packing, start
from engine.kernels.quantized_reference import INT8_MAX, quantize_int8

# A digit's worth in the next: rounding leaves half a unit to either side.
DIGIT_BASE = 2 * INT8_MAX


def bind_weights(codes_NK: Tensor, scale_N: Tensor) -> Callable[[Tensor], Tensor]:
    """`linear_int8` with these weights."""
    library = compiled.load("int8")
    if library is None:
        return TorchInt8Weights(codes_NK, scale_N)
    return Packing(int8.pack_weights, library, codes_NK, scale_N)


def bind_activations(
    codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """`linear_w8a8` with these weights."""
    library = compiled.load("int8")
    if library is None:
        return TorchInt8Activations(codes_NK, scale_N, input_scale)
    return Packing(int8.pack_activations, library, codes_NK, scale_N, input_scale)


class TorchInt8Weights:
    """A token is the sum of a few int8 digits, whose products with the codes are exact."""

    def __init__(self, codes_NK: Tensor, scale_N: Tensor):
        self._product = start(pack_product, codes_NK)
        self._scale_N = scale_N

    def __call__(self, x_TK: Tensor) -> Tensor:
        digits_DTK, step_T1 = split_digits(x_TK, EXACT_DIGITS[x_TK.dtype])
        sums_XN = self._product.result()(digits_DTK.flatten(0, 1))
        *greater, y_TN = sums_XN.unflatten(0, digits_DTK.shape[:2]).unbind()
        for sums_TN in reversed(greater):
            y_TN = torch.add(sums_TN, y_TN, alpha=1 / DIGIT_BASE)
        return (y_TN * (step_T1 * self._scale_N)).to(x_TK.dtype)


class TorchInt8Activations:
    """Tokens are rounded to codes by PyTorch."""

    def __init__(self, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None):
        self._product = start(pack_product, codes_NK)
        self._scale_N, self._input_scale = scale_N, input_scale

    def __call__(self, x_TK: Tensor) -> Tensor:
        x_codes_TK, x_scale = quantize_int8(x_TK, self._input_scale)
        sums_TN = self._product.result()(x_codes_TK)
        return (sums_TN * (x_scale * self._scale_N)).to(x_TK.dtype)


def split_digits(x_TK: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Whole numbers -127…127 as fp32 [count, T, K] and steps [T, 1]: the sum of digit d times
    step / 254^d is the token, up to half a unit of the last digit."""
    rest_TK = x_TK.float()
    amax_T1 = torch.maximum(rest_TK.amax(-1, True), -rest_TK.amin(-1, True))
    step_T1 = amax_T1.clamp(min=MIN_TOKEN_RANGE) / INT8_MAX
    rest_TK = rest_TK / step_T1
    digits_DTK = torch.empty(count, *x_TK.shape)
    for digit_TK in digits_DTK:
        torch.round(rest_TK, out=digit_TK)
        rest_TK.sub_(digit_TK).mul_(DIGIT_BASE)
    return digits_DTK, step_T1
