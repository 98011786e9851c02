"""The tensors that TensorRT-LLM's unified checkpoint has for a linear layer, one store per mode.

Each gets the parts of one rank, to be joined along outputs, and the layer's name in its block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from engine import unified
from engine.mapping import Span
from engine.quant import Algorithm
from engine.weights import numerics
from engine.weights.convert import StorePlan
from engine.weights.deferred import Deferred, defer
from engine.weights.pack import (
    Arrays,
    Packed,
    Parts,
    pack_dense,
    pack_fp8,
    pack_int8_activations,
    pack_rows,
)
from engine.weights.types import Fp8, Int4Groups, LinearWeights

# Adding 8 to a two's complement nibble flips its highest bit.
SIGN_BIT = ZERO = 8

# The library's op: codes int8 -8…7 [in, out] → bytes for one GPU class, as fp16 [in, out / 4].
Preprocess = Callable[[Tensor], Tensor]
Store = Callable[[Parts, StorePlan, str], list[Packed]]


def _arrays(packed: Sequence[Packed]) -> dict[str, Packed]:
    return {one.suffix: one for one in packed}


def _derive(
    suffix: str, source: Packed, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]
) -> Packed:
    """A small fp32 tensor made of all of `source`."""

    def blocks() -> Iterator[Tensor]:
        yield change(torch.cat(list(source.blocks()))).reshape(shape).contiguous()

    return Packed(suffix, torch.float32, shape, blocks)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _common(scale_N: Tensor) -> Tensor:
    """The one scale that all rows have."""
    assert torch.equal(scale_N, scale_N[:1].expand_as(scale_N)), "one scale per matrix"
    return scale_N[0]


def _constant(suffix: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Packed:
    return Packed(suffix, dtype, shape, lambda: iter([torch.ones(shape, dtype=dtype)]))


def store_dense(parts: Parts, plan: StorePlan, name: str) -> list[Packed]:
    return pack_dense(parts, plan.dtype)


def store_awq(parts: Parts, plan: StorePlan, name: str) -> list[Packed]:
    """weight int8 [N/2, K], the low nibble being the even row, two's complement;
    weights_scaling_factor fp32 [N, R]; prequant_scaling_factor [K], ones where there is none."""

    def arrange(w: Int4Groups) -> Arrays:
        rows = {"weight": pack_row_pairs(w.codes_NK), "weights_scaling_factor": w.scale_NR}
        if w.pre_scale_K is None:
            return Arrays(rows)
        return Arrays(rows, {"prequant_scaling_factor": w.pre_scale_K.to(plan.dtype)})

    packed = pack_rows(parts, arrange)
    if len(packed) == 2:
        packed.append(_constant("prequant_scaling_factor", (parts[0].inputs,), plan.dtype))
    return packed


def pack_row_pairs(codes_NK: Tensor) -> Tensor:
    """4-bit codes 0…15 around 8, uint8 [N, K], as two's complement nibbles of two rows a byte."""
    if codes_NK.is_meta:
        return codes_NK[::2].view(torch.int8)
    even_MK, odd_MK = codes_NK.bitwise_xor(SIGN_BIT).unflatten(0, (-1, 2)).unbind(1)
    return (even_MK | odd_MK << 4).view(torch.int8)


def store_fp8(parts: Parts, plan: StorePlan, name: str) -> list[Packed]:
    """weight float8_e4m3fn [N, K], weights_scaling_factor and activation_scaling_factor [1]."""
    arrays = _arrays(pack_fp8(_with_one_scale(parts), plan.dtype))
    return [
        replace(arrays["codes"], suffix="weight"),
        _derive("weights_scaling_factor", arrays["scale"], (1,), _common),
        _derive("activation_scaling_factor", arrays["input_scale"], (1,), _same),
    ]


def _with_one_scale(parts: Parts) -> list[Deferred]:
    """`parts` rounded anew to the largest of their scales; a part that has it stays as it is."""
    deferred = [defer(part) for part in parts]

    @cache
    def largest() -> Tensor:
        first = [next(part.read(Span(0, 1))).scale_N for part in deferred]
        return torch.cat(first).amax()

    def rescale(block: Fp8) -> Fp8:
        if torch.equal(block.scale_N, largest().expand_as(block.scale_N)):
            return block
        codes_NK, scale_N = numerics.fp8_tensor(numerics.dequantize(block), largest())
        return replace(block, codes_NK=codes_NK, scale_N=scale_N)

    def reader(part: Deferred) -> Callable[[Span], Iterator[LinearWeights]]:
        return lambda rows: (rescale(block) for block in part.read(rows))

    return [Deferred(part.sketch, reader(part)) for part in deferred]


def store_plugin(parts: Parts, plan: StorePlan, name: str) -> list[Packed]:
    """SmoothQuant as TensorRT-LLM's converters write it.

    weight int8 [N, K]; per_channel_scale [1, N], or [1, 1] for one scale per matrix except in qkv;
    static: act_scale [1, 1] and what the input is multiplied by, [1]; the smoother [1, K] of dense
    and proj. The product of act_scale and per_channel_scale is that of input and weight scale.
    """
    arrays = _arrays(pack_int8_activations(parts, plan.dtype))
    outputs, inputs = arrays["codes"].shape
    by_row = plan.quant.per_channel or name == unified.QKV
    packed = [
        replace(arrays["codes"], suffix="weight"),
        _derive("per_channel_scale", arrays["scale"], (1, outputs), _same)
        if by_row
        else _derive("per_channel_scale", arrays["scale"], (1, 1), _common),
    ]
    if "input_scale" in arrays:
        packed.append(_derive("act_scale", arrays["input_scale"], (1, 1), _same))
        if name in unified.TO_INT8:
            to_int8 = _derive(unified.TO_INT8[name], arrays["input_scale"], (1,), torch.reciprocal)
            packed.append(to_int8)
    elif name in (unified.QKV, unified.FC):
        packed.append(_constant(unified.TO_INT8[name], (1,)))
    if name in (unified.DENSE, unified.PROJ):
        packed.append(
            _derive("smoother", arrays["smoother"], (1, inputs), _same)
            if "smoother" in arrays
            else _constant("smoother", (1, inputs))
        )
    return packed


def store_smoothed(parts: Parts, plan: StorePlan, name: str) -> list[Packed]:
    """SmoothQuant as ModelOpt writes it: weight int8 [N, K], weights_scaling_factor [N],
    activation_scaling_factor [1], prequant_scaling_factor [K] (the input's factor)."""
    arrays = _arrays(pack_int8_activations(parts, plan.dtype))
    outputs, inputs = arrays["codes"].shape
    factor = _derive("", arrays["smoother"], (inputs,), torch.reciprocal)
    return [
        replace(arrays["codes"], suffix="weight"),
        _derive("weights_scaling_factor", arrays["scale"], (outputs,), _same),
        _derive("activation_scaling_factor", arrays["input_scale"], (1,), _same),
        Packed(
            "prequant_scaling_factor",
            plan.dtype,
            (inputs,),
            lambda: (block.to(plan.dtype) for block in factor.blocks()),
        ),
    ]


def store_gptq(parts: Parts, preprocess: Preprocess) -> list[Packed]:
    """weight as the library's op makes it, fp16 [K, N/4]; weights_scaling_factor and zero fp16
    [R, N], where weight = (code - 8) · scale + zero. Held whole: the op takes no less."""
    outputs, inputs = sum(part.outputs for part in parts), parts[0].inputs
    deferred = [defer(part) for part in parts]
    groups = deferred[0].sketch.scale_NR.shape[1]

    def join(change: Callable[[Int4Groups], Tensor]) -> Tensor:
        return torch.cat([change(w) for part in deferred for w in part.blocks()]).t().contiguous()

    def zero(w: Int4Groups) -> Tensor:
        shift = 0 if w.zero_NR is None else ZERO - w.zero_NR.float()
        return (shift * w.scale_NR).half()

    return [
        Packed(
            "weight",
            torch.float16,
            (inputs, outputs // 4),
            lambda: iter([preprocess(join(lambda w: w.codes_NK.to(torch.int8) - ZERO))]),
        ),
        Packed(
            "weights_scaling_factor",
            torch.float16,
            (groups, outputs),
            lambda: iter([join(lambda w: w.scale_NR.half())]),
        ),
        Packed("zero", torch.float16, (groups, outputs), lambda: iter([join(zero)])),
    ]


STORES: dict[Algorithm, Store] = {
    Algorithm.NONE: store_dense,
    Algorithm.W8A16: store_dense,
    Algorithm.W4A16: store_dense,
    Algorithm.W4A16_AWQ: store_awq,
    Algorithm.W8A8_SQ: store_plugin,
    Algorithm.FP8: store_fp8,
}
