"""Linear layers with quantised weights in plain PyTorch, for any device.

The contracts are in `api.py`. Weights are widened a block of rows at a time, so that no layer is
ever in memory in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_MAX = 127
FP8_MAX = 448.0
INT4_ZERO = 8
# Inputs of a nibble block where the layer has no groups.
NIBBLE_BLOCK = 64

# A token of zeros gets this range, as in TensorRT-LLM's per-token quantisation.
MIN_TOKEN_RANGE = 1e-6

# Weights widened at a time.
BLOCK_WEIGHTS = 2**22


def linear_int8(x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor) -> Tensor:
    return _by_rows(x_TK, codes_NK, lambda rows: codes_NK[rows].float() * scale_N[rows, None])


def linear_int4(x_TK: Tensor, codes_NB: Tensor, scale_N: Tensor) -> Tensor:
    def widen(rows: slice) -> Tensor:
        codes_NK = unpack_nibbles(codes_NB[rows], NIBBLE_BLOCK).float()
        return (codes_NK - INT4_ZERO) * scale_N[rows, None]

    return _by_rows(x_TK, codes_NB, widen)


def linear_int4_groups(
    x_TK: Tensor, codes_NB: Tensor, scale_NR: Tensor, zero_NR: Tensor | None, block: int
) -> Tensor:
    groups = scale_NR.shape[1]

    def widen(rows: slice) -> Tensor:
        codes_NRG = unpack_nibbles(codes_NB[rows], block).float().unflatten(1, (groups, -1))
        zero = INT4_ZERO if zero_NR is None else zero_NR[rows, :, None].float()
        return ((codes_NRG - zero) * scale_NR[rows, :, None].float()).flatten(1)

    return _by_rows(x_TK, codes_NB, widen)


def linear_w8a8(
    x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> Tensor:
    x_codes_TK, x_scale = quantize_int8(x_TK, input_scale)
    # Sums of products of codes are whole numbers beyond fp32's exact range, within fp64's.
    wide_TK = x_codes_TK.double()
    sums_TN = _by_rows(wide_TK, codes_NK, lambda rows: codes_NK[rows].double())
    return (sums_TN.float() * (x_scale * scale_N)).to(x_TK.dtype)


def linear_fp8(
    x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> Tensor:
    x_codes_TK, x_scale = quantize_fp8(x_TK, input_scale)
    sums_TN = _by_rows(x_codes_TK.float(), codes_NK, lambda rows: codes_NK[rows].float())
    return (sums_TN * (x_scale * scale_N)).to(x_TK.dtype)


def quantize_int8(x_TK: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whole numbers -127…127 as fp32 [T, K], and their scale: the given one, which broadcasts, or
    one per token [T, 1], amax / 127."""
    wide_TK = x_TK.float()
    if scale is None:
        scale = token_range(wide_TK) / INT8_MAX
    return (wide_TK / scale).round_().clamp_(-INT8_MAX, INT8_MAX), scale


def quantize_fp8(x_TK: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [T, K], and their scale: the given one, which broadcasts, or one per
    token [T, 1], amax / 448."""
    wide_TK = x_TK.float()
    if scale is None:
        scale = token_range(wide_TK) / FP8_MAX
    # The cast itself makes NaN of what is too large.
    return (wide_TK / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def token_range(x_TK: Tensor) -> Tensor:
    """The largest magnitude of each token, at least MIN_TOKEN_RANGE: [T, 1]."""
    return torch.maximum(x_TK.amax(-1, True), -x_TK.amin(-1, True)).clamp(min=MIN_TOKEN_RANGE)


def unpack_nibbles(codes_NB: Tensor, block: int) -> Tensor:
    """uint8 [N, K/2] → 0…15 [N, K]: of each `block` inputs, the first half is in the low and the
    second in the high nibbles of block/2 bytes."""
    halves = codes_NB.unflatten(1, (-1, block // 2))
    return torch.stack((halves & 15, halves >> 4), dim=2).flatten(1)


def _by_rows(x_TK: Tensor, codes: Tensor, widen: Callable[[slice], Tensor]) -> Tensor:
    """x @ wᵀ in x's dtype, in fp32 at least; `widen` gives rows of w."""
    dtype = torch.promote_types(x_TK.dtype, torch.float32)
    wide_TK = x_TK.to(dtype)
    parts = [F.linear(wide_TK, widen(rows)) for rows in row_blocks(codes, x_TK.shape[1])]
    return torch.cat(parts, dim=1).to(x_TK.dtype)


def row_blocks(codes: Tensor, inputs: int, weights: int = BLOCK_WEIGHTS) -> Iterator[slice]:
    """Slices of the rows of `codes`, of about `weights` weights each."""
    step = max(1, weights // inputs)
    return (slice(start, start + step) for start in range(0, len(codes), step))
