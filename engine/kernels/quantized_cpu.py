"""Linear layers with quantised weights, fast on x86 CPUs.

Each operation is a class that lays its weights out for the CPU once, in a thread beside the
loading of others, and is then called with tokens. The rules are measured ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.kernels import cpu, cpu_int4, packing
from engine.kernels.cpu_integer import pack_product
from engine.kernels.packing import start
from engine.kernels.quantized_reference import (
    INT8_MAX,
    quantize_fp8,
    quantize_int8,
    row_blocks,
)

# Int8 digits that a token is written with: fp32 tokens get 31 bits below their largest value, the
# others 15, whose error is below their dtype's own rounding of the product even if one value of
# the token outweighs all others.
FP32_DIGITS, DIGITS = 4, 2
# A digit's worth in the next: rounding leaves half a unit to either side.
DIGIT_BASE = 2 * INT8_MAX
# A token of smaller values loses bits.
MIN_TOKEN_RANGE = 1e-30

# Part of the machine's memory that widened FP8 weights must leave.
RESERVED_MEMORY = 0.25


class Int8Weights:
    """A token is the sum of a few int8 digits, whose products with the codes are exact.

    No result depends on the batch it is computed in.
    """

    def __init__(self, codes_NK: Tensor, scale_N: Tensor):
        self._product = start(pack_product, codes_NK)
        self._scale_N = scale_N

    def __call__(self, x_TK: Tensor) -> Tensor:
        count = FP32_DIGITS if x_TK.dtype == torch.float32 else DIGITS
        digits_DTK, step_T1 = split_digits(x_TK, count)
        sums_XN = self._product.result()(digits_DTK.flatten(0, 1))
        *greater, y_TN = sums_XN.unflatten(0, digits_DTK.shape[:2]).unbind()
        for sums_TN in reversed(greater):
            y_TN = torch.add(sums_TN, y_TN, alpha=1 / DIGIT_BASE)
        return (y_TN * (step_T1 * self._scale_N)).to(x_TK.dtype)


class Int8Activations:
    """Exact sums of the products of codes. No result depends on the batch it is computed in."""

    def __init__(self, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None):
        self._product = start(pack_product, codes_NK)
        self._scale_N, self._input_scale = scale_N, input_scale

    def __call__(self, x_TK: Tensor) -> Tensor:
        x_codes_TK, x_scale = quantize_int8(x_TK, self._input_scale)
        sums_TN = self._product.result()(x_codes_TK)
        return (sums_TN * (x_scale * self._scale_N)).to(x_TK.dtype)


class Fp8Weights:
    """Products of the codes in bf16, which holds them exactly (fp32 for fp32 tokens).

    CPUs multiply no FP8, and PyTorch's own operation reads 0.2 GB/s. So the weights are widened
    once where the memory allows it, which doubles them, else at each call.
    """

    def __init__(self, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None):
        self._codes_NK, self._scale_N, self._input_scale = codes_NK, scale_N, input_scale
        self._wide_NK = start(_widen_if_room, codes_NK)

    def __call__(self, x_TK: Tensor) -> Tensor:
        x_codes_TK, x_scale = quantize_fp8(x_TK, self._input_scale)
        sums_TN = self._multiply(widen_fp8(x_codes_TK), x_TK.dtype)
        scale = x_scale * self._scale_N * cpu.FP8_FACTOR**-2
        return (sums_TN.float() * scale).to(x_TK.dtype)

    def _multiply(self, x_TK: Tensor, dtype: torch.dtype) -> Tensor:
        wide_NK = self._wide_NK.result()
        if wide_NK is not None and dtype != torch.float32:
            return cpu.linear(x_TK, wide_NK)
        x_TK = x_TK.float() if dtype == torch.float32 else x_TK
        blocks = row_blocks(self._codes_NK, x_TK.shape[1], packing.BLOCK_WEIGHTS)
        parts = [
            cpu.linear(x_TK, widen_fp8(self._codes_NK[rows]).to(x_TK.dtype)) for rows in blocks
        ]
        return torch.cat(parts, dim=1)


def linear_int8(x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor) -> Tensor:
    return Int8Weights(codes_NK, scale_N)(x_TK)


def linear_w8a8(
    x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> Tensor:
    return Int8Activations(codes_NK, scale_N, input_scale)(x_TK)


def linear_int4(x_TK: Tensor, codes_NB: Tensor, scale_N: Tensor) -> Tensor:
    return cpu_int4.bind_rows(codes_NB, scale_N)(x_TK)


def linear_int4_groups(
    x_TK: Tensor, codes_NB: Tensor, scale_NR: Tensor, zero_NR: Tensor | None, block: int
) -> Tensor:
    return cpu_int4.bind_groups(codes_NB, scale_NR, zero_NR, block)(x_TK)


def linear_fp8(
    x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> Tensor:
    return Fp8Weights(codes_NK, scale_N, input_scale)(x_TK)


# What registry.bind makes layers of.
BOUND = {
    "linear_int8": Int8Weights,
    "linear_w8a8": Int8Activations,
    "linear_int4": cpu_int4.bind_rows,
    "linear_int4_groups": cpu_int4.bind_groups,
    "linear_fp8": Fp8Weights,
}


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


def widen_fp8(codes: Tensor) -> Tensor:
    """float8_e4m3fn → bf16 of cpu.FP8_FACTOR times the value, exactly."""
    # PyTorch's step from fp16 to bf16 is four times slower than that by way of fp32.
    return cpu.fp8_as_fp16(codes).float().bfloat16()


def _widen_if_room(codes_NK: Tensor) -> Tensor | None:
    available, total = _memory_bytes()
    if available - 2 * codes_NK.nbytes < RESERVED_MEMORY * total:
        return None
    wide_NK = torch.empty(codes_NK.shape, dtype=torch.bfloat16)
    for rows in row_blocks(codes_NK, codes_NK.shape[1], packing.BLOCK_WEIGHTS):
        wide_NK[rows] = widen_fp8(codes_NK[rows])
    return wide_NK


def _memory_bytes() -> tuple[int, int]:
    """Available and total; without Linux' file of them, as much as anyone asks for."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62, 1 << 62
    kibibytes = {
        name: int(value.split()[0]) for name, _, value in (s.partition(":") for s in lines)
    }
    return kibibytes["MemAvailable"] << 10, kibibytes["MemTotal"] << 10
