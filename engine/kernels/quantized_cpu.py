"""Linear layers with quantised weights, fast on x86 CPUs.

Each operation is a class that lays its weights out for the CPU once, in a thread beside the
loading of others, and is then called with tokens. The rules are measured ones.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import cpu, quantized_reference
from engine.kernels.cpu_integer import pack_product
from engine.kernels.quantized_reference import (
    INT4_ZERO,
    INT8_MAX,
    NIBBLE_BLOCK,
    quantize_fp8,
    quantize_int8,
    row_blocks,
    unpack_nibbles,
)

Result = TypeVar("Result")

# Int8 digits that a token is written with: fp32 tokens get 31 bits below their largest value, the
# others 15, whose error is below their dtype's own rounding of the product even if one value of
# the token outweighs all others.
FP32_DIGITS, DIGITS = 4, 2
# A digit's worth in the next: rounding leaves half a unit to either side.
DIGIT_BASE = 2 * INT8_MAX
# A token of smaller values loses bits.
MIN_TOKEN_RANGE = 1e-30

# Group sizes that PyTorch's int4 operation takes, a divisor of its outputs, and its interleaving.
INT4_GROUPS = (256, 128, 64, 32)
INT4_OUTPUTS = 16
INT4_ROW_BLOCK = 64
# From this many tokens on, widening the weights for oneDNN is faster than that operation.
INT4_TOKENS = 48

# What `widen_fp8` multiplies with.
FP8_FACTOR = 2.0**-8
# Part of the machine's memory that widened FP8 weights must leave.
RESERVED_MEMORY = 0.25

# Weights widened or rearranged at a time: what is made of them stays in the third-level cache.
BLOCK_WEIGHTS = 2**20


class Int8Weights:
    """A token is the sum of a few int8 digits, whose products with the codes are exact.

    No result depends on the batch it is computed in.
    """

    def __init__(self, codes_NK: Tensor, scale_N: Tensor):
        self._product = _start(pack_product, codes_NK)
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
        self._product = _start(pack_product, codes_NK)
        self._scale_N, self._input_scale = scale_N, input_scale

    def __call__(self, x_TK: Tensor) -> Tensor:
        x_codes_TK, x_scale = quantize_int8(x_TK, self._input_scale)
        sums_TN = self._product.result()(x_codes_TK)
        return (sums_TN * (x_scale * self._scale_N)).to(x_TK.dtype)


class Int4Weights:
    """bf16 products with the codes, which bf16 holds exactly; fp32 ones for fp32 tokens."""

    def __init__(self, codes_NB: Tensor, scale_N: Tensor):
        inputs = 2 * codes_NB.shape[1]
        group = next(size for size in INT4_GROUPS if inputs % size == 0)
        self._product = _Int4Product(codes_NB, None, None, NIBBLE_BLOCK, group)
        self._codes_NB, self._scale_N = codes_NB, scale_N

    def __call__(self, x_TK: Tensor) -> Tensor:
        if x_TK.dtype == torch.float32:
            return quantized_reference.linear_int4(x_TK, self._codes_NB, self._scale_N)
        return (self._product(x_TK.bfloat16()) * self._scale_N).to(x_TK.dtype)


class Int4GroupWeights:
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
            self._product = _Int4Product(codes_NB, scale_NR, zero_NR, block, group)

    def __call__(self, x_TK: Tensor) -> Tensor:
        if self._product is None or x_TK.dtype == torch.float32:
            return quantized_reference.linear_int4_groups(x_TK, *self._weights)
        return self._product(x_TK.bfloat16()).to(x_TK.dtype)


class Fp8Weights:
    """Products of the codes in bf16, which holds them exactly (fp32 for fp32 tokens).

    CPUs multiply no FP8, and PyTorch's own operation reads 0.2 GB/s. So the weights are widened
    once where the memory allows it, which doubles them, else at each call.
    """

    def __init__(self, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None):
        self._codes_NK, self._scale_N, self._input_scale = codes_NK, scale_N, input_scale
        self._wide_NK = _start(_widen_if_room, codes_NK)

    def __call__(self, x_TK: Tensor) -> Tensor:
        x_codes_TK, x_scale = quantize_fp8(x_TK, self._input_scale)
        sums_TN = self._multiply(widen_fp8(x_codes_TK), x_TK.dtype)
        scale = x_scale * self._scale_N * FP8_FACTOR**-2
        return (sums_TN.float() * scale).to(x_TK.dtype)

    def _multiply(self, x_TK: Tensor, dtype: torch.dtype) -> Tensor:
        wide_NK = self._wide_NK.result()
        if wide_NK is not None and dtype != torch.float32:
            return cpu.linear(x_TK, wide_NK)
        x_TK = x_TK.float() if dtype == torch.float32 else x_TK
        blocks = row_blocks(self._codes_NK, x_TK.shape[1], BLOCK_WEIGHTS)
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
    return Int4Weights(codes_NB, scale_N)(x_TK)


def linear_int4_groups(
    x_TK: Tensor, codes_NB: Tensor, scale_NR: Tensor, zero_NR: Tensor | None, block: int
) -> Tensor:
    return Int4GroupWeights(codes_NB, scale_NR, zero_NR, block)(x_TK)


def linear_fp8(
    x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> Tensor:
    return Fp8Weights(codes_NK, scale_N, input_scale)(x_TK)


# What registry.bind makes layers of.
BOUND = {
    "linear_int8": Int8Weights,
    "linear_w8a8": Int8Activations,
    "linear_int4": Int4Weights,
    "linear_int4_groups": Int4GroupWeights,
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
    """float8_e4m3fn → bf16 of 2^-8 times the value: exact, four times faster than the cast.

    With its exponent and fraction moved to fp16's places, a code is an fp16 value, the smallest
    ones included; only the bias of the exponent differs, by 8.
    """
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    # The sign was extended into the exponent's highest bit.
    return bits.bitwise_and_(~0x4000).view(torch.float16).to(torch.bfloat16)


class _Int4Product:
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
            self._packed = _start(_pack_int4, codes_NB, scale_NR, zero_NR, block, group)

    def __call__(self, x_TK: Tensor) -> Tensor:
        if self._packed is not None and 0 < len(x_TK) < INT4_TOKENS:
            codes, scales = self._packed.result()
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x_TK, codes, self._group, scales)
        blocks = row_blocks(self._codes_NB, x_TK.shape[1], BLOCK_WEIGHTS)
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
    rows = max(INT4_ROW_BLOCK, BLOCK_WEIGHTS // inputs // INT4_ROW_BLOCK * INT4_ROW_BLOCK)
    for target, part in zip(packed_NB.split(rows), codes_NB.split(rows), strict=True):
        words_NK = unpack_nibbles(part, block).to(torch.int32)
        target.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(words_NK, 2))
    scales_RN2 = torch.zeros(inputs // group, len(codes_NB), 2, dtype=torch.bfloat16)
    scales_RN2[..., 0] = 1 if scale_NR is None else scale_NR.T
    if zero_NR is not None:
        assert scale_NR is not None
        scales_RN2[..., 1] = ((INT4_ZERO - zero_NR.float()) * scale_NR).T
    return packed_NB, scales_RN2


def _widen_if_room(codes_NK: Tensor) -> Tensor | None:
    available, total = _memory_bytes()
    if available - 2 * codes_NK.nbytes < RESERVED_MEMORY * total:
        return None
    wide_NK = torch.empty(codes_NK.shape, dtype=torch.bfloat16)
    for rows in row_blocks(codes_NK, codes_NK.shape[1], BLOCK_WEIGHTS):
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


def _start(make: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """`make` in a thread of its own; the constructors of other layers do not wait for it."""
    return _packers().submit(make, *arguments)


@cache
def _packers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="pack")
