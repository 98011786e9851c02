"""Brings linear weights into the form that a quantisation mode stores.

Whole matrices are quantised, before they are cut for ranks, so that scales do not depend on the
number of ranks; rows are read and rounded only when an engine file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import UserError
from engine.mapping import Span
from engine.quant import Algorithm, QuantConfig
from engine.weights import numerics
from engine.weights.deferred import Deferred
from engine.weights.pack import nonfinite_error
from engine.weights.types import Dense, Fp8, Int4, Int4Groups, Int8, LinearWeights

# Floor of a smoother and of the largest weight it is computed from (TensorRT-LLM).
MIN_SMOOTHER = 1e-5


def quantize(
    weights: LinearWeights | Deferred, quant: QuantConfig, *, is_dummy: bool = False
) -> LinearWeights | Deferred:
    """`weights` as mode `quant` stores them.

    Full-precision weights are rounded, each output by itself; quantised ones are passed on. Raises
    UserError for those that do not fit the mode, and for modes that need calibration, unless the
    weights are random anyway (`is_dummy`).
    """
    if isinstance(weights, Dense) and quant.algorithm is not Algorithm.NONE:
        if quant.algorithm is Algorithm.FP8 and weights.input_scale is not None:
            return quantize_fp8(weights)
        rounder = _dummy_rounder(quant) if is_dummy else _ROUNDERS.get(quant.algorithm)
        if rounder is not None:
            return _round(weights, rounder)
        raise UserError(f"'{quant}' {_REMEDIES[quant.algorithm]}")
    _require_fit(weights.sketch if isinstance(weights, Deferred) else weights, quant)
    return weights


def quantize_fp8(weights: Dense) -> Deferred:
    """Per-tensor FP8 with the calibrated scale of the input and, where known, of the weights."""

    @cache
    def scale() -> float:
        if weights.weight_scale is not None:
            return weights.weight_scale
        parts = [numerics.amax_tensor(block) for block in weights.weight_NK.blocks()]
        return (torch.stack(parts).max() / numerics.FP8_MAX).item()

    def make(codes_NK: Tensor, scale_N: Tensor) -> Fp8:
        return Fp8(codes_NK, scale_N, weights.input_scale)

    def round_rows(w_NK: Tensor) -> tuple[Tensor, Tensor]:
        return numerics.fp8_tensor(w_NK, scale())

    return _round(weights, Rounder(make, numerics.FP8, round_rows))


class Smoothed(NamedTuple):
    """SmoothQuant's factors of one input: it is divided by `smoother_K`, the weights that read it
    are multiplied by it; `ranges_K` is the input's largest magnitudes afterwards."""

    smoother_K: Tensor
    ranges_K: Tensor


def smooth(ranges_K: Tensor, weights: Sequence[Tensor], alpha: float) -> Smoothed:
    """s = xmax^alpha / wmax^(1 - alpha) per input channel (arXiv 2211.10438), fp32 [K].

    `ranges_K` is the largest magnitude of each channel over the calibration data; `weights` are
    all matrices [N, K] that read this input, whose columns share a smoother.
    """
    assert 0 <= alpha <= 1
    columns = [torch.maximum(-w_NK.amin(0), w_NK.amax(0)).float() for w_NK in weights]
    wmax_K = torch.stack(columns).amax(0).clamp(min=MIN_SMOOTHER)
    xmax_K = ranges_K.float()
    smoother_K = (xmax_K.pow(alpha) / wmax_K.pow(1 - alpha)).clamp(min=MIN_SMOOTHER)
    return Smoothed(smoother_K, xmax_K / smoother_K)


def smooth_weight(w_NK: Tensor, smoother_K: Tensor) -> Tensor:
    """The matrix that reads a smoothed input, fp32."""
    return w_NK.float() * smoother_K


def smooth_norm(weight_E: Tensor, smoother_K: Tensor) -> Tensor:
    """The weight of the norm before, fp32, whose output is then smoothed for free."""
    return weight_E.float() / smoother_K


class Rounder(NamedTuple):
    """How full precision becomes `kind`: codes of `dtype` and one scale per output, or per group
    of `group_size` inputs of it."""

    kind: Callable[[Tensor, Tensor], LinearWeights]
    dtype: torch.dtype
    round_rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    group_size: int = 0


_ROUNDERS = {
    Algorithm.W8A16: Rounder(Int8, torch.int8, numerics.int8_rows),
    Algorithm.W4A16: Rounder(Int4, torch.uint8, numerics.int4_rows),
    Algorithm.FP8: Rounder(Fp8, numerics.FP8, numerics.fp8_rows),
}

# Inputs of a model with random weights are normed, and both stay within some standard deviations.
DUMMY_INPUT_RANGE, DUMMY_WEIGHT_RANGE = 6.0, 0.125


def _dummy_rounder(quant: QuantConfig) -> Rounder:
    """Rounds to the nearest where a real build needs calibration; FP8 is as if calibrated."""
    if quant.algorithm is Algorithm.W8A8_SQ:
        input_scale = None if quant.per_token else DUMMY_INPUT_RANGE / numerics.INT8_MAX
        return Rounder(partial(Int8, input_scale=input_scale), torch.int8, numerics.int8_rows)
    if quant.algorithm is Algorithm.FP8:
        input_scale = DUMMY_INPUT_RANGE / numerics.FP8_MAX
        round_rows = partial(numerics.fp8_tensor, scale=DUMMY_WEIGHT_RANGE / numerics.FP8_MAX)
        return Rounder(partial(Fp8, input_scale=input_scale), numerics.FP8, round_rows)
    if quant.algorithm in _ROUNDERS:
        return _ROUNDERS[quant.algorithm]
    return Rounder(
        partial(Int4Groups, group_size=quant.group_size),
        torch.uint8,
        partial(numerics.int4_groups, group_size=quant.group_size),
        quant.group_size,
    )


_REMEDIES = {
    Algorithm.W8A8_SQ: "(--use_smooth_quant) needs a calibrated checkpoint but these weights are "
    "in full precision; convert them with hf_yi_convert.py --smoothquant and build with its output "
    "as --ft_model_dir",
    Algorithm.W4A16_AWQ: "needs weights that AWQ has quantised but these are in full precision; "
    "name an AWQ checkpoint as --quant_ckpt_path or --model_dir",
    Algorithm.W4A16_GPTQ: "needs weights that GPTQ has quantised but these are in full precision; "
    "name a GPTQ checkpoint as --quant_ckpt_path or --model_dir",
}

_KINDS: dict[type, str] = {
    Dense: "full-precision",
    Int8: "int8",
    Int4: "int4 per-channel",
    Int4Groups: "int4",
    Fp8: "FP8",
}
_STORED: dict[Algorithm, type] = {
    Algorithm.NONE: Dense,
    Algorithm.W8A16: Int8,
    Algorithm.W4A16: Int4,
    Algorithm.W4A16_AWQ: Int4Groups,
    Algorithm.W4A16_GPTQ: Int4Groups,
    Algorithm.W8A8_SQ: Int8,
    Algorithm.FP8: Fp8,
}


def _round(weights: Dense, rounder: Rounder) -> Deferred:
    """`weights` rounded block by block as they are read; no row's result depends on another's."""

    def read(rows: Span) -> Iterator[LinearWeights]:
        lazy = weights.weight_NK.narrow_rows(rows)
        for block_NK in lazy.blocks():
            if not torch.isfinite(numerics.amax_tensor(block_NK)):
                raise nonfinite_error(lazy.source)
            yield rounder.kind(*rounder.round_rows(block_NK))

    codes_NK = torch.empty(weights.outputs, weights.inputs, dtype=rounder.dtype, device="meta")
    per_row = (weights.inputs // rounder.group_size,) if rounder.group_size else ()
    scale = torch.empty(weights.outputs, *per_row, device="meta")
    return Deferred(rounder.kind(codes_NK, scale), read)


def _require_fit(sketch: LinearWeights, quant: QuantConfig) -> None:
    if not isinstance(sketch, _STORED[quant.algorithm]) or not _fits(sketch, quant):
        raise UserError(
            f"the checkpoint's linear layers are {describe(sketch)} but the quantisation flags ask "
            f"for '{quant}'; leave these flags out to build what the checkpoint is, or name the "
            "full-precision checkpoint it was made from"
        )


def _fits(sketch: LinearWeights, quant: QuantConfig) -> bool:
    """What the type alone does not show."""
    if isinstance(sketch, Int4Groups):
        is_awq = quant.algorithm is Algorithm.W4A16_AWQ
        return sketch.group_size == quant.group_size and (is_awq or sketch.pre_scale_K is None)
    if isinstance(sketch, Int8) and quant.algorithm is Algorithm.W8A8_SQ:
        return quant.per_token == (sketch.input_scale is None)
    if isinstance(sketch, Int8):
        return sketch.input_scale is None and sketch.smoother_K is None
    return True


def describe(sketch: LinearWeights) -> str:
    """What linear weights are, in the words of messages."""
    words = _KINDS[type(sketch)]
    if isinstance(sketch, Int4Groups):
        words += f" in groups of {sketch.group_size}"
        words += " with AWQ's scales of the input" if sketch.pre_scale_K is not None else ""
    if isinstance(sketch, Int8 | Fp8) and sketch.input_scale is not None:
        words += " with a calibrated scale of the input"
    if isinstance(sketch, Int8) and sketch.smoother_K is not None:
        words += " smoothed by SmoothQuant"
    return words
