"""One pack per quantisation mode: from meaning to the arrays an engine file stores.

The arrays are the ones the kernels of every device read: K-contiguous rows, joined sources below
each other. A pack knows no checkpoint format and no rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.base import TensorSource
from engine.errors import CheckpointError, UserError
from engine.quant import Algorithm
from engine.weights.deferred import Deferred, defer
from engine.weights.types import Fp8, Int4, Int4Groups, Int8, Lazy, LinearWeights

# Raised whenever an array's meaning changes, so that old engines are refused, not misread.
LAYOUT_VERSION = 1

# Inputs of a nibble block (32 where groups are shorter).
NIBBLE_BLOCK = 64
SYMMETRIC_ZERO = 8

Parts = Sequence[LinearWeights | Deferred]


@dataclass(frozen=True)
class Packed:
    """One array of an engine file: what it is and where its bytes come from."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]


def pack_plain(parts: Sequence[Lazy], dtype: torch.dtype) -> list[Packed]:
    """Full-precision tensors joined along rows: weight [sum of rows, K] in `dtype`."""
    rows = sum(part.shape[0] for part in parts)
    shape = (rows, *parts[0].shape[1:])
    assert all(part.shape[1:] == shape[1:] for part in parts)

    def blocks() -> Iterator[Tensor]:
        for part in parts:
            for block in part.blocks():
                yield _cast(block, dtype, part)

    return [Packed("weight", dtype, shape, blocks)]


def pack_dense(parts: Parts, dtype: torch.dtype) -> list[Packed]:
    """Unquantised linear layer: weight [N, K]."""
    return pack_plain([part.weight_NK for part in parts], dtype)


def pack_int8(parts: Parts, dtype: torch.dtype) -> list[Packed]:
    """codes int8 [N, K], scale fp32 [N]."""
    return pack_rows(parts, lambda w: Arrays({"codes": w.codes_NK, "scale": w.scale_N}))


def pack_int4(parts: Parts, dtype: torch.dtype) -> list[Packed]:
    """codes uint8 [N, K/2] (see `pack_nibbles`), scale fp32 [N]."""
    _require_whole_blocks(parts, NIBBLE_BLOCK)

    def arrange(w: Int4) -> Arrays:
        return Arrays({"codes": pack_nibbles(w.codes_NK, NIBBLE_BLOCK), "scale": w.scale_N})

    return pack_rows(parts, arrange)


def pack_int4_groups(parts: Parts, dtype: torch.dtype) -> list[Packed]:
    """codes uint8 [N, K/2], scale fp16 (fp32 in fp32 engines) [N, R]; zero uint8 [N, R] if any
    part has one, else all are 8; pre_scale fp32 [K] if the input has a factor."""
    sketches = [defer(part).sketch for part in parts]
    block = nibble_block(sketches[0].group_size)
    assert all(sketch.group_size == sketches[0].group_size for sketch in sketches)
    _require_whole_blocks(parts, block)
    has_zero = any(sketch.zero_NR is not None for sketch in sketches)
    scale_dtype = torch.float32 if dtype == torch.float32 else torch.float16

    def arrange(w: Int4Groups) -> Arrays:
        rows = {
            "codes": pack_nibbles(w.codes_NK, block),
            "scale": _cast_scale(w.scale_NR, scale_dtype),
        }
        if has_zero:
            eights_NR = torch.full_like(w.scale_NR, SYMMETRIC_ZERO, dtype=torch.uint8)
            rows["zero"] = eights_NR if w.zero_NR is None else w.zero_NR
        return Arrays(rows, _given(pre_scale=w.pre_scale_K))

    return pack_rows(parts, arrange)


def pack_int8_activations(parts: Parts, dtype: torch.dtype) -> list[Packed]:
    """codes int8 [N, K], scale fp32 [N]; input_scale fp32 [1] if it is calibrated; smoother fp32
    [K] if the input is divided by one."""

    def arrange(w: Int8) -> Arrays:
        shared = _given(input_scale=w.input_scale, smoother=w.smoother_K)
        return Arrays({"codes": w.codes_NK, "scale": w.scale_N}, shared)

    return pack_rows(parts, arrange)


def pack_fp8(parts: Parts, dtype: torch.dtype) -> list[Packed]:
    """codes float8_e4m3fn [N, K], scale fp32 [N]; input_scale fp32 [1] if it is calibrated."""

    def arrange(w: Fp8) -> Arrays:
        rows = {"codes": w.codes_NK, "scale": w.scale_N}
        return Arrays(rows, _given(input_scale=w.input_scale))

    return pack_rows(parts, arrange)


# A pack gets the parts of one rank, to be joined along outputs, and the engine's dtype.
PACKS: dict[Algorithm, Callable[[Parts, torch.dtype], list[Packed]]] = {
    Algorithm.NONE: pack_dense,
    Algorithm.W8A16: pack_int8,
    Algorithm.W4A16: pack_int4,
    Algorithm.W4A16_AWQ: pack_int4_groups,
    Algorithm.W4A16_GPTQ: pack_int4_groups,
    Algorithm.W8A8_SQ: pack_int8_activations,
    Algorithm.FP8: pack_fp8,
}


def nibble_block(group_size: int) -> int:
    """Inputs of one nibble block: the kernels take whole blocks of one group at a time."""
    assert group_size % 32 == 0, group_size
    return 32 if group_size % NIBBLE_BLOCK else NIBBLE_BLOCK


def pack_nibbles(codes_NK: Tensor, block: int) -> Tensor:
    """4-bit codes, two a byte: [N, K] → uint8 [N, K/2].

    Within `block` consecutive inputs, byte j holds input j in its low and input block/2 + j in its
    high nibble, so that unpacking a vector of bytes gives two runs of neighbours.
    """
    if codes_NK.is_meta:
        # Only the shape is wanted; arithmetic on this device would import PyTorch's compiler.
        return codes_NK[:, ::2]
    low, high = codes_NK.unflatten(1, (-1, 2, block // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_nibbles(bytes_NB: Tensor, block: int) -> Tensor:
    """The inverse of `pack_nibbles`."""
    halves = bytes_NB.unflatten(1, (-1, block // 2))
    return torch.stack((halves & 15, halves >> 4), dim=2).flatten(1)


@dataclass(frozen=True)
class Arrays:
    """Stored arrays of some rows of a layer: those with a row per output, and those that all rows
    share."""

    rows: dict[str, Tensor]
    shared: dict[str, Tensor] = field(default_factory=dict)


class _Pass:
    """The arrays of a layer, of one pass over its parts.

    Writing the first array computes them all; the others, which are small, wait until they are
    written. An array asked for out of turn costs another pass.
    """

    def __init__(self, parts: Sequence[Deferred], arrange: Callable[[LinearWeights], Arrays]):
        self._parts, self._arrange = parts, arrange
        self._waiting: dict[str, list[Tensor]] = {}

    def blocks(self, suffix: str) -> Iterator[Tensor]:
        if suffix in self._waiting:
            yield from self._waiting.pop(suffix)
            return
        waiting: dict[str, list[Tensor]] = {}
        for block in (block for part in self._parts for block in part.blocks()):
            arrays = self._arrange(block)
            for name, array in arrays.rows.items():
                if name == suffix:
                    yield array.contiguous()
                else:
                    waiting.setdefault(name, []).append(array.clone())
            for name, array in arrays.shared.items():
                first = waiting.setdefault(name, [array])[0]
                assert torch.equal(array, first), f"{name} of joined layers differs"
        if suffix in waiting:
            yield from waiting.pop(suffix)
        else:
            self._waiting = waiting


def pack_rows(parts: Parts, arrange: Callable[[Any], Arrays]) -> list[Packed]:
    """The arrays that `arrange` makes of blocks of rows; it runs on a sketch for their shapes.

    A row of an array holds one output or, packed, a whole number of them.
    """
    deferred = [defer(part) for part in parts]
    first = arrange(deferred[0].sketch)
    rows, sketched = sum(part.outputs for part in deferred), deferred[0].outputs
    shapes = {
        name: (rows * array.shape[0] // sketched, *array.shape[1:])
        for name, array in first.rows.items()
    }
    shapes |= {name: tuple(array.shape) for name, array in first.shared.items()}
    dtypes = {name: array.dtype for name, array in (first.rows | first.shared).items()}
    once = _Pass(deferred, arrange)
    return [
        Packed(name, dtypes[name], shape, partial(once.blocks, name))
        for name, shape in shapes.items()
    ]


def _given(**values: Tensor | float | None) -> dict[str, Tensor]:
    """The values that are not None, as fp32 tensors of one dimension."""
    return {
        name: torch.as_tensor(value, dtype=torch.float32).reshape(-1)
        for name, value in values.items()
        if value is not None
    }


def _cast_scale(scale_NR: Tensor, dtype: torch.dtype) -> Tensor:
    cast_NR = scale_NR.to(dtype)
    if not cast_NR.is_meta and not torch.isfinite(cast_NR).all():
        raise CheckpointError(
            f"a layer's group scales reach {scale_NR.max().item():.3g}, more than float16 holds; "
            "build with --dtype float32, or use another checkpoint"
        )
    return cast_NR


def _require_whole_blocks(parts: Parts, block: int) -> None:
    inputs = parts[0].inputs
    if inputs % block:
        raise UserError(
            f"--tp_size leaves a rank {inputs} inputs of a linear layer, which int4 weights need "
            f"to be a multiple of {block}; choose a smaller --tp_size, or int8 weights"
        )


def nonfinite_error(source: TensorSource) -> CheckpointError:
    """For weights that no engine can hold."""
    return CheckpointError(
        f"{source.origin}: tensor {source.name} holds NaN or infinite values; the file is "
        "damaged or of a failed training, get a sound copy"
    )


def _cast(block: Tensor, dtype: torch.dtype, part: Lazy) -> Tensor:
    """`block` in `dtype`; CheckpointError if the result holds a NaN or an infinity."""
    cast = block.to(dtype)
    # The extremes carry every NaN and infinity, and cost a tenth of looking at each value.
    if not torch.isfinite(torch.stack(torch.aminmax(cast))).all():
        source = part.source
        if torch.isfinite(block).all():
            raise CheckpointError(
                f"{source.origin}: tensor {source.name} has values up to "
                f"{block.abs().max().item():.3g}, more than --dtype {str(dtype)[6:]} can hold; "
                "build with --dtype bfloat16 or float32"
            )
        raise nonfinite_error(source)
    return cast
