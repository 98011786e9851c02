"""What a linear layer's weights mean, before any storage layout.

`LinearWeights` is a sum type: each member knows its sizes and how to split itself along outputs or
inputs, and nothing of files, ranks or kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.errors import UserError
from engine.mapping import Span

if TYPE_CHECKING:
    from engine.checkpoint.base import TensorSource

# Big enough that a block's fixed costs vanish, small enough to stay in the cache of two cores.
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Lazy:
    """A window of a checkpoint tensor that is read in row blocks when it is written.

    `rows` may reach past the source's end: those rows are zeros (vocabulary padding). `cols` is
    None for a vector.
    """

    source: TensorSource
    rows: Span
    cols: Span | None

    @classmethod
    def whole(cls, source: TensorSource) -> Lazy:
        cols = Span(0, source.shape[1]) if len(source.shape) == 2 else None
        return cls(source, Span(0, source.shape[0]), cols)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows.size,) if self.cols is None else (self.rows.size, self.cols.size)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def narrow_rows(self, span: Span) -> Lazy:
        start = self.rows.start
        return replace(self, rows=Span(start + span.start, start + span.stop))

    def narrow_cols(self, span: Span) -> Lazy:
        assert self.cols is not None
        start = self.cols.start
        return replace(self, cols=Span(start + span.start, start + span.stop))

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[Tensor]:
        """Contiguous row blocks in order, about `block_bytes` of the source each."""
        row_bytes = self.dtype.itemsize * (self.source.shape[1] if self.cols else 1)
        step = max(1, block_bytes // row_bytes)
        filled = min(self.rows.stop, self.source.shape[0])
        for start in range(self.rows.start, filled, step):
            block = self.source.rows(start, min(start + step, filled))
            if self.cols is not None and self.cols.size != block.shape[1]:
                block = block[:, self.cols.start : self.cols.stop].contiguous()
            yield block
        missing = self.rows.stop - max(filled, self.rows.start)
        if missing > 0:
            yield torch.zeros((missing, *self.shape[1:]), dtype=self.dtype)

    def read(self) -> Tensor:
        return torch.cat(list(self.blocks()))


@dataclass(frozen=True)
class Dense:
    """Full-precision weights [N, K].

    `input_scale` and `weight_scale` are what a calibration found for FP8, amax / 448 of the whole
    input and of the whole matrix; None where there was none.
    """

    weight_NK: Lazy
    input_scale: float | None = None
    weight_scale: float | None = None

    @property
    def outputs(self) -> int:
        return self.weight_NK.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight_NK.shape[1]

    def narrow_outputs(self, span: Span) -> Dense:
        return replace(self, weight_NK=self.weight_NK.narrow_rows(span))

    def narrow_inputs(self, span: Span) -> Dense:
        return replace(self, weight_NK=self.weight_NK.narrow_cols(span))


@dataclass(frozen=True)
class Int8:
    """weight = codes · scale, codes int8 [N, K] and scale fp32 [N] (one value repeated where the
    source has one scale per tensor).

    With quantised activations: `input_scale` is the calibrated fp32 scale of the whole input (None:
    one per token at run time), and the input is divided by `smoother_K` before it is quantised.
    """

    codes_NK: Tensor
    scale_N: Tensor
    input_scale: float | None = None
    smoother_K: Tensor | None = None

    @property
    def outputs(self) -> int:
        return self.codes_NK.shape[0]

    @property
    def inputs(self) -> int:
        return self.codes_NK.shape[1]

    def narrow_outputs(self, span: Span) -> Int8:
        rows = slice(*span)
        return replace(self, codes_NK=self.codes_NK[rows], scale_N=self.scale_N[rows])

    def narrow_inputs(self, span: Span) -> Int8:
        cols = slice(*span)
        smoother_K = None if self.smoother_K is None else self.smoother_K[cols]
        return replace(self, codes_NK=self.codes_NK[:, cols], smoother_K=smoother_K)


@dataclass(frozen=True)
class Int4:
    """weight = (codes - 8) · scale, codes uint8 0…15 [N, K], scale fp32 [N]."""

    codes_NK: Tensor
    scale_N: Tensor

    @property
    def outputs(self) -> int:
        return self.codes_NK.shape[0]

    @property
    def inputs(self) -> int:
        return self.codes_NK.shape[1]

    def narrow_outputs(self, span: Span) -> Int4:
        rows = slice(*span)
        return Int4(self.codes_NK[rows], self.scale_N[rows])

    def narrow_inputs(self, span: Span) -> Int4:
        return replace(self, codes_NK=self.codes_NK[:, slice(*span)])


@dataclass(frozen=True)
class Int4Groups:
    """weight = (codes - zero) · scale in groups of `group_size` consecutive inputs.

    codes uint8 0…15 [N, K]; scale fp32 [N, R]; zero uint8 0…16 [N, R], None where every zero is
    8. The input is multiplied by `pre_scale_K` first (AWQ), where there is one.
    """

    codes_NK: Tensor
    scale_NR: Tensor
    group_size: int
    zero_NR: Tensor | None = None
    pre_scale_K: Tensor | None = None

    @property
    def outputs(self) -> int:
        return self.codes_NK.shape[0]

    @property
    def inputs(self) -> int:
        return self.codes_NK.shape[1]

    def narrow_outputs(self, span: Span) -> Int4Groups:
        rows = slice(*span)
        return replace(
            self,
            codes_NK=self.codes_NK[rows],
            scale_NR=self.scale_NR[rows],
            zero_NR=None if self.zero_NR is None else self.zero_NR[rows],
        )

    def narrow_inputs(self, span: Span) -> Int4Groups:
        if span.start % self.group_size or span.stop % self.group_size:
            groups = self.inputs // self.group_size
            raise UserError(
                f"--tp_size cuts {self.inputs} inputs of a layer into parts of {span.size}, which "
                f"is not a whole number of its {groups} groups of {self.group_size}; choose a "
                f"--tp_size that divides {groups}"
            )
        cols = slice(*span)
        groups = slice(span.start // self.group_size, span.stop // self.group_size)
        return replace(
            self,
            codes_NK=self.codes_NK[:, cols],
            scale_NR=self.scale_NR[:, groups],
            zero_NR=None if self.zero_NR is None else self.zero_NR[:, groups],
            pre_scale_K=None if self.pre_scale_K is None else self.pre_scale_K[cols],
        )


@dataclass(frozen=True)
class Fp8:
    """weight = codes · scale, codes float8_e4m3fn [N, K] and scale fp32 [N] (one value repeated
    where the source has one scale per tensor); `input_scale` as in `Int8`."""

    codes_NK: Tensor
    scale_N: Tensor
    input_scale: float | None = None

    @property
    def outputs(self) -> int:
        return self.codes_NK.shape[0]

    @property
    def inputs(self) -> int:
        return self.codes_NK.shape[1]

    def narrow_outputs(self, span: Span) -> Fp8:
        rows = slice(*span)
        return replace(self, codes_NK=self.codes_NK[rows], scale_N=self.scale_N[rows])

    def narrow_inputs(self, span: Span) -> Fp8:
        return replace(self, codes_NK=self.codes_NK[:, slice(*span)])


LinearWeights = Dense | Int8 | Int4 | Int4Groups | Fp8
