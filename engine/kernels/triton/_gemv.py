"""y = product of one token with all rows of a matrix, with what a block does around it.

A program owns BN rows and all of K, so no sums meet in memory; BN is so small (2…16) that even
4096 rows give every multiprocessor several programs. A row is read in chunks of 16 bytes, one a
lane; a chunk's products are added in its lane, so that sums take few registers. The next tile is
loaded before the present one is used, and the first before the wait for the previous kernel.

RMSNorm: the sum of w · (x · g) is scaled by 1 / rms(x), found beside it. Nothing is rounded but
the result, so it differs from norm, product and activation in a row by their roundings. Where
codes meet the token, each chunk of it is written with digits of 16 bits below its own largest
value (31 for fp32), and sums of digits and codes are exact.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._around import PLAIN, Around
from engine.kernels.triton._codes import has_float8
from engine.kernels.triton._gemv_codes import _gemv_codes
from engine.kernels.triton._gemv_words import _gemv_bytes, _gemv_halves, _gemv_nibbles
from engine.kernels.triton._launch import launch_options, processors
from engine.kernels.triton._tactics import Config
from engine.kernels.triton._weights import Weights
from engine.kernels.triton._words import finish_row, load_residual, rms_of

IS_COMPILED = not triton.knobs.runtime.interpret
CHUNK_BYTES = 16
# Tokens are read in words of so many bytes.
WORD_BYTES = 8


@triton.jit
def _load_chunks(codes, row, inside, chunk, width, VEC: tl.constexpr):
    """Chunks `chunk` [C] of VEC codes of rows [BN] (int64), 0 outside: [C, BN, VEC]."""
    column = chunk[:, None, None] * VEC + tl.arange(0, VEC)[None, None, :]
    mask = inside[None, :, None] & (column < width)
    at = row[None, :, None] * width + column
    return tl.load(codes + at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _load_input(x, norm, column, inputs):
    """x · norm fp32, and x² for the norm."""
    value = tl.load(x + column, mask=column < inputs, other=0.0).to(tl.float32)
    square = value * value
    if norm is not None:
        value *= tl.load(norm + column, mask=column < inputs, other=0.0).to(tl.float32)
    return value, square


@triton.jit
def _gemv(
    y, x, codes, scale, norm, residual, outputs, inputs, eps,
    GATED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, VEC: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """fp32 weights, and rows of any width."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    C: tl.constexpr = BK // VEC
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = row < outputs
    lane = tl.arange(0, C)
    tile = _load_chunks(codes, row, inside, lane, inputs, VEC)  # [C, BN, VEC]
    if GATED:
        up_tile = _load_chunks(codes, row + outputs, inside, lane, inputs, VEC)
    if PDL:
        tl.extra.cuda.gdc_wait()
    added = load_residual(residual, row, inside)
    sums = tl.zeros([C, BN], tl.float32)
    up_sums = tl.zeros([C, BN], tl.float32)
    squares = tl.zeros([C, 1], tl.float32)
    for start in range(0, inputs, BK):
        chunk = start // VEC + lane
        column = chunk[:, None, None] * VEC + tl.arange(0, VEC)[None, None, :]
        value, square = _load_input(x, norm, column, inputs)  # [C, 1, VEC]
        squares += tl.sum(square, axis=2)
        present = tile.to(tl.float32)
        tile = _load_chunks(codes, row, inside, chunk + C, inputs, VEC)
        sums += tl.sum(present * value, axis=2)
        if GATED:
            present = up_tile.to(tl.float32)
            up_tile = _load_chunks(codes, row + outputs, inside, chunk + C, inputs, VEC)
            up_sums += tl.sum(present * value, axis=2)
    finish_row(
        y, tl.sum(sums, axis=0), tl.sum(up_sums, axis=0), scale,
        rms_of(squares, inputs, eps, norm is not None), added, row, inside, outputs, GATED,
    )  # fmt: skip


def multiply_token(
    x_1K: Tensor, weights: Weights, config: Config, around: Around = PLAIN
) -> Tensor:
    """y [1, N] (or [1, N/2] if gated) of x [1, K], of x's dtype."""
    assert x_1K.shape == (1, weights.inputs) and x_1K.stride(1) == 1
    assert around.factor_K is None or (weights.block and around.norm is None)
    codes, y_1N = weights.codes, _make_output(x_1K, weights, around)
    norm_K, eps = around.norm or (None, 0.0)
    grid, shared = _launch(y_1N, config, around)
    if not _has_words(x_1K, weights):
        vector = CHUNK_BYTES // codes.element_size()
        _gemv[grid](
            y_1N, x_1K, codes, weights.scale, norm_K, around.residual_TN,
            y_1N.shape[1], weights.inputs, eps,
            BK=vector * _chunks(weights, config), VEC=vector, **shared,
        )  # fmt: skip
        return y_1N
    if x_1K.data_ptr() % WORD_BYTES:
        x_1K = x_1K.clone()
    words = codes.view(torch.int32)
    sizes = (y_1N.shape[1], words.shape[1])
    shared["C"] = _chunks(weights, config)
    if codes.is_floating_point():
        _gemv_halves[grid](y_1N, x_1K, words, norm_K, around.residual_TN, *sizes, eps, **shared)
    elif not weights.block:
        _gemv_bytes[grid](
            y_1N, x_1K, words, weights.scale, norm_K, around.residual_TN, *sizes, eps,
            ASSEMBLY=IS_COMPILED, **shared,
        )  # fmt: skip
    else:
        chunks = triton.cdiv(words.shape[1] * words.element_size(), CHUNK_BYTES)
        programs = _resident(grid[0], config.resident, x_1K.device)
        factor_K, _, is_norm = around.factors
        _gemv_nibbles[(programs,)](
            y_1N, x_1K, words, weights.scale, weights.zero_NR, factor_K, around.residual_TN,
            *sizes, weights.group or weights.inputs, eps, RMS=is_norm,
            HAS_GROUPS=bool(weights.group), HALF=weights.block // 2,
            PARTS=triton.cdiv(chunks, shared["C"]), ASSEMBLY=IS_COMPILED, **shared,
        )  # fmt: skip
    return y_1N


def multiply_codes(
    x_1K: Tensor,
    x_scale_1: Tensor,
    weights: Weights,
    config: Config,
    around: Around = PLAIN,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """y [1, N] of `dtype` of a token's codes, of the weights' type; or, for float8 weights, of a
    token that is to be rounded to codes of `x_scale`, and normed before if asked."""
    assert x_1K.shape == (1, weights.inputs) and x_1K.stride(1) == 1
    codes = weights.codes
    y_1N = _make_output(x_1K, weights, around, dtype)
    norm_K, eps = around.norm or (None, 0.0)
    grid, shared = _launch(y_1N, config, around)
    has_codes = x_1K.dtype == codes.dtype
    assert has_codes or codes.dtype == torch.float8_e4m3fn
    assert not has_codes or around.norm is None
    if x_1K.data_ptr() % WORD_BYTES:
        x_1K = x_1K.clone()
    words = codes.view(torch.int32)
    _gemv_codes[grid](
        y_1N, x_1K.view(torch.int32) if has_codes else x_1K, words, weights.scale, x_scale_1,
        norm_K, around.residual_TN, y_1N.shape[1], words.shape[1], eps,
        IS_FLOAT=codes.dtype == torch.float8_e4m3fn, C=_chunks(weights, config),
        CONVERTS=IS_COMPILED and has_float8(codes.device),
        ASSEMBLY=IS_COMPILED, **shared,
    )  # fmt: skip
    return y_1N


def _make_output(
    x_1K: Tensor, weights: Weights, around: Around, dtype: torch.dtype | None = None
) -> Tensor:
    outputs = weights.outputs // (2 if around.is_gated else 1)
    return torch.empty(1, outputs, dtype=dtype or x_1K.dtype, device=x_1K.device)


def _launch(y_1N: Tensor, config: Config, around: Around) -> tuple[tuple[int], dict[str, Any]]:
    # A gated program has two rows for each result.
    rows = max(1, config.rows // 2) if around.is_gated else config.rows
    options = {"GATED": around.is_gated, "BN": rows, "num_warps": config.warps}
    return (triton.cdiv(y_1N.shape[1], rows),), {**options, **launch_options(y_1N.device)}


def _resident(blocks: int, per_processor: int, device: torch.device) -> int:
    """Programs for blocks of rows: as many as the GPU holds at once, with equally many blocks."""
    places = processors(device) * max(1, per_processor)
    return triton.cdiv(blocks, triton.cdiv(blocks, places))


def _has_words(x_1K: Tensor, weights: Weights) -> bool:
    """Whether rows are whole words of codes that a kernel reads as such."""
    if weights.block:
        return True
    codes = weights.codes
    if codes.dtype == torch.int8:
        return weights.inputs % 4 == 0
    return codes.element_size() == 2 and codes.dtype == x_1K.dtype and weights.inputs % 4 == 0


def _chunks(weights: Weights, config: Config) -> int:
    """Chunks of 16 bytes of a row and an iteration: no more than the row has."""
    per_row = triton.cdiv(weights.codes.shape[1] * weights.codes.element_size(), CHUNK_BYTES)
    wanted = config.inputs * weights.codes.shape[1] * weights.codes.element_size()
    wanted //= weights.inputs * CHUNK_BYTES
    return max(1, min(wanted, triton.next_power_of_2(per_row)))
