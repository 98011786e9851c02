"""y = product of one token with all rows of a matrix, with what a block does around it.

A program owns BN rows and all of K, so no sums meet in memory; BN is so small (2…16) that even
4096 rows give every multiprocessor several programs. A row is read in chunks of 16 bytes, one a
lane; a chunk's products are added in its lane, so that sums take few registers. The next tile is
loaded before the present one is used, and the first before the wait for the previous kernel.

RMSNorm: the sum of w · (x · g) is scaled by 1 / rms(x), found beside it. Nothing is rounded but
the result, so it differs from norm, product and activation in a row by their roundings.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._codes import decode
from engine.kernels.triton._launch import launch_options
from engine.kernels.triton._tactics import Config
from engine.kernels.triton._weights import Weights
from engine.kernels.triton._words import CHUNK_BYTES, _finish_row, _gemv_bytes, _gemv_nibbles

IS_COMPILED = not triton.knobs.runtime.interpret
CHUNK_CODES = 2 * CHUNK_BYTES
# Tokens are read in words of so many bytes.
WORD_BYTES = 8


@triton.jit
def _load_chunks(codes, row, inside, chunk, width, VEC: tl.constexpr):
    """Chunks `chunk` [C] of VEC codes of rows [BN] (int64), 0 outside: [C, BN, VEC].

    The compiler spreads the first of two such dimensions over lanes and warps: a lane has a chunk
    of every row, and its part of x once.
    """
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
    C: tl.constexpr = BK // VEC
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = row < outputs
    lane = tl.arange(0, C)
    tile = _load_chunks(codes, row, inside, lane, inputs, VEC)  # [C, BN, VEC]
    if GATED:
        up_tile = _load_chunks(codes, row + outputs, inside, lane, inputs, VEC)
    if PDL:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([C, BN], tl.float32)
    up_sums = tl.zeros([C, BN], tl.float32)
    squares = tl.zeros([C, 1], tl.float32)
    for start in range(0, inputs, BK):
        chunk = start // VEC + lane
        column = chunk[:, None, None] * VEC + tl.arange(0, VEC)[None, None, :]
        value, square = _load_input(x, norm, column, inputs)  # [C, 1, VEC]
        if norm is not None:
            squares += tl.sum(square, axis=2)
        present = decode(tile, tl.float32, False)
        tile = _load_chunks(codes, row, inside, chunk + C, inputs, VEC)
        sums += tl.sum(present * value, axis=2)
        if GATED:
            present = decode(up_tile, tl.float32, False)
            up_tile = _load_chunks(codes, row + outputs, inside, chunk + C, inputs, VEC)
            up_sums += tl.sum(present * value, axis=2)
    _finish_row(
        y, tl.sum(sums, axis=0), tl.sum(up_sums, axis=0), scale, squares, residual,
        row, inside, outputs, inputs, eps, scale is not None, norm is not None, GATED,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def multiply_token(
    x_1K: Tensor,
    weights: Weights,
    config: Config,
    *,
    norm: tuple[Tensor, float] | None = None,
    is_gated: bool = False,
    residual_1N: Tensor | None = None,
) -> Tensor:
    """y [1, N] (or [1, N/2] if gated) of x [1, K], of x's dtype."""
    assert x_1K.shape == (1, weights.inputs) and x_1K.stride(1) == 1
    outputs = weights.outputs // (2 if is_gated else 1)
    y_1N = torch.empty(1, outputs, dtype=x_1K.dtype, device=x_1K.device)
    norm_K, eps = (None, 0.0) if norm is None else norm
    # A gated program has two rows for each result.
    rows = max(1, config.rows // 2) if is_gated else config.rows
    shared: dict[str, Any] = {
        "GATED": is_gated,
        "BN": rows,
        "num_warps": config.warps,
        **launch_options(x_1K.device),
    }
    grid = (triton.cdiv(outputs, rows),)
    has_words = weights.codes.dtype == torch.int8 and weights.inputs % 4 == 0
    if not weights.block and not has_words:
        _gemv[grid](
            y_1N, x_1K, weights.codes, weights.scale, norm_K, residual_1N,
            outputs, weights.inputs, eps, BK=_span(weights, config),
            VEC=CHUNK_BYTES // weights.codes.element_size(), **shared,
        )  # fmt: skip
        return y_1N
    words = weights.codes.view(torch.int32)
    if x_1K.data_ptr() % WORD_BYTES:
        x_1K = x_1K.clone()
    if not weights.block:
        _gemv_bytes[grid](
            y_1N, x_1K, words, weights.scale, norm_K, residual_1N, outputs, words.shape[1], eps,
            C=_span(weights, config) // CHUNK_BYTES, ASSEMBLY=IS_COMPILED, **shared,
        )  # fmt: skip
        return y_1N
    _gemv_nibbles[grid](
        y_1N, x_1K, words, weights.scale, weights.zero_NR, norm_K, residual_1N,
        outputs, words.shape[1], weights.group or weights.inputs, eps,
        HAS_GROUPS=bool(weights.group), HALF=weights.block // 2,
        C=_span(weights, config) // CHUNK_CODES, ASSEMBLY=IS_COMPILED, **shared,
    )  # fmt: skip
    return y_1N


def _span(weights: Weights, config: Config) -> int:
    """Inputs of an iteration: no more than the matrix has."""
    return min(config.inputs, max(64, triton.next_power_of_2(weights.inputs)))
