"""Quantisation arithmetic: pure functions on canonical [N outputs, K inputs] matrices.

Everything is computed in fp32 and rounded half to even. Knows no file format, rank or kernel.
Activation quantisers are here too, so that a reference model can do what the kernels do.

Dimensions: T tokens, N outputs, K inputs, R groups along K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.weights.types import Dense, Int4, Int4Groups, Int8, LinearWeights

INT8_MAX = 127
INT4_MIN, INT4_MAX = -8, 7
INT4_ZERO = 8
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

# A token of zeros gets this range, as in TensorRT-LLM's per-token quantisation.
MIN_TOKEN_RANGE = 1e-6

# Parts of the largest weight at which a row of 4-bit codes may be clipped; the first of equals is
# taken. For normal weights the optimum lies near 0.7, for heavy tails lower.
CLIP_RATIOS = tuple(1 - step / 20 for step in range(14))
# fp32 elements that are worked on at a time: 2 MB, so that most passes run in a core's cache.
CHUNK = 2**19


def int8_rows(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 -127…127 [N, K] and scale fp32 [N] = amax / 127.

    TensorRT-LLM divides by 128 and lets the largest weight clip; with 127 nothing clips.
    """
    return _by_rows(lambda w: _int8(w, _positive(_amax(w, 1) / INT8_MAX)), w_NK)


def int8_tensor(w_NK: Tensor, scale: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    """`int8_rows` with one scale, by default that of the largest weight; it is repeated to [N]."""
    scale_N = _one_scale(w_NK, scale, INT8_MAX)
    return _by_rows(_int8, w_NK, scale_N)


def int4_rows(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 0…15 [N, K], meaning -8…7, and scale fp32 [N] with the least squared error
    among `CLIP_RATIOS`."""
    return _by_rows(lambda w: _int4(w, _clip_search(w)), w_NK)


def int4_groups(
    w_NK: Tensor, group_size: int, amax_NR: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 0…15 [N, K] around 8 and scale fp32 [N, R] = amax / 7.

    `amax_NR` is the range of each group where a calibration chose it; larger weights clip.
    """
    outputs, inputs = w_NK.shape
    assert inputs % group_size == 0
    rows = w_NK.reshape(-1, group_size)
    if amax_NR is None:
        codes, scale = _by_rows(lambda w: _int4(w, _positive(_amax(w, 1) / INT4_MAX)), rows)
    else:
        codes, scale = _by_rows(_int4, rows, _positive(amax_NR.float().reshape(-1) / INT4_MAX))
    return codes.view(outputs, inputs), scale.view(outputs, -1)


def fp8_rows(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [N, K] and scale fp32 [N] = amax / 448."""
    return _by_rows(lambda w: _fp8(w, _positive(_amax(w, 1) / FP8_MAX)), w_NK)


def fp8_tensor(w_NK: Tensor, scale: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    """`fp8_rows` with one scale, by default that of the largest weight; it is repeated to [N].
    What exceeds a given scale's range saturates."""
    scale_N = _one_scale(w_NK, scale, FP8_MAX)
    return _by_rows(_fp8, w_NK, scale_N)


def dequantize(weights: LinearWeights) -> Tensor:
    """The fp32 [N, K] matrix that multiplies the layer's input.

    The factor of the input (AWQ's `pre_scale`, SmoothQuant's smoother) is multiplied in;
    the rounding of activations is left out.
    """
    if isinstance(weights, Dense):
        return weights.weight_NK.read().float()
    if isinstance(weights, Int4Groups):
        return _dequantize_groups(weights)
    codes_NK = weights.codes_NK.float()
    if isinstance(weights, Int4):
        codes_NK -= INT4_ZERO
    w_NK = codes_NK * weights.scale_N[:, None]
    if isinstance(weights, Int8) and weights.smoother_K is not None:
        w_NK /= weights.smoother_K
    return w_NK


def fake_int8(x_TK: Tensor, scale: Tensor | float | None = None) -> Tensor:
    """x rounded to int8 steps and back; without a scale, one per token: amax / 127."""
    x = x_TK.float()
    if scale is None:
        scale = _amax(x, -1).clamp(min=MIN_TOKEN_RANGE).unsqueeze(-1) / INT8_MAX
    codes = (x / scale).round_().clamp_(-INT8_MAX, INT8_MAX)
    return (codes * scale).to(x_TK.dtype)


def fake_fp8(x_TK: Tensor, scale: Tensor | float | None = None) -> Tensor:
    """x rounded to float8_e4m3fn and back; without a scale, one per token: amax / 448."""
    x = x_TK.float()
    if scale is None:
        scale = _amax(x, -1).clamp(min=MIN_TOKEN_RANGE).unsqueeze(-1) / FP8_MAX
    codes = (x / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
    return (codes.float() * scale).to(x_TK.dtype)


def amax_tensor(w_NK: Tensor) -> Tensor:
    """The largest magnitude, fp32 []; NaN or infinite if any element is."""
    low, high = torch.aminmax(w_NK)
    return torch.maximum(-low, high).float()


def _dequantize_groups(weights: Int4Groups) -> Tensor:
    codes_NRG = weights.codes_NK.float().unflatten(1, (-1, weights.group_size))
    zero_NR = weights.zero_NR
    codes_NRG -= INT4_ZERO if zero_NR is None else zero_NR.float()[..., None]
    w_NK = (codes_NRG * weights.scale_NR[..., None]).flatten(1)
    return w_NK if weights.pre_scale_K is None else w_NK * weights.pre_scale_K


def _int8(w_NK: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    codes_NK = (w_NK / scale_N[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return codes_NK.to(torch.int8), scale_N


def _int4(w_NK: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    codes_NK = (w_NK / scale_N[:, None]).round_().clamp_(INT4_MIN, INT4_MAX)
    return codes_NK.add_(INT4_ZERO).to(torch.uint8), scale_N


def _fp8(w_NK: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    return (w_NK / scale_N[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale_N


def _clip_search(w_NK: Tensor) -> Tensor:
    """Scale [N] of the clip with the least squared error."""
    amax_N = _amax(w_NK, 1)
    best_N = torch.ones_like(amax_N)
    least_N = torch.full_like(amax_N, torch.inf)
    steps_NK, codes_NK = torch.empty_like(w_NK), torch.empty_like(w_NK)
    for ratio in CLIP_RATIOS:
        scale_N = _positive(amax_N * ratio / INT4_MAX)
        torch.div(w_NK, scale_N[:, None], out=steps_NK)
        torch.round(steps_NK, out=codes_NK).clamp_(INT4_MIN, INT4_MAX).sub_(steps_NK)
        error_N = torch.linalg.vector_norm(codes_NK, dim=1) * scale_N
        best_N = torch.where(error_N < least_N, scale_N, best_N)
        torch.minimum(error_N, least_N, out=least_N)
    return best_N


def _amax(x: Tensor, dim: int) -> Tensor:
    # Two passes without a temporary: many times faster than aminmax(dim) or abs().amax().
    return torch.maximum(-x.amin(dim), x.amax(dim))


def _positive(scale: Tensor) -> Tensor:
    """1 for rows of zeros, whose codes are zeros for any scale."""
    return torch.where(scale > 0, scale, 1.0)


def _one_scale(w_NK: Tensor, scale: Tensor | float | None, largest: float) -> Tensor:
    given = amax_tensor(w_NK) / largest if scale is None else scale
    one = torch.as_tensor(given, dtype=torch.float32, device=w_NK.device).reshape(1)
    return _positive(one).expand(len(w_NK))


def _by_rows(
    quantise: Callable[..., tuple[Tensor, Tensor]], w_NK: Tensor, *per_row: Tensor
) -> tuple[Tensor, Tensor]:
    """(codes, scale) of all rows, computed in fp32 for as many rows at a time as a cache holds."""
    rows = max(1, CHUNK // max(1, w_NK.shape[1]))
    chunks = zip(w_NK.split(rows), *(values.split(rows) for values in per_row), strict=True)
    parts = [quantise(chunk.float(), *values) for chunk, *values in chunks]
    codes, scales = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scales)
