"""Tensors made of other tensors, still unread: windows, joins, views, copies that agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.checkpoint.base import TensorSource
from engine.errors import CheckpointError
from engine.mapping import Span


class Window(TensorSource):
    """A range of a tensor along `dim` (0 or 1)."""

    def __init__(self, source: TensorSource, dim: int, span: Span) -> None:
        assert 0 <= span.start <= span.stop <= source.shape[dim], (source.name, dim, span)
        self.name, self.dtype, self.origin = source.name, source.dtype, source.origin
        self.shape = (*source.shape[:dim], span.size, *source.shape[dim + 1 :])
        self.source, self.dim, self.span = source, dim, span

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = self.row_span(start, stop)
        if self.dim == 0:
            return self.source.rows(self.span.start + start, self.span.start + stop)
        return self.source.rows(start, stop)[:, slice(*self.span)].contiguous()


class Joined(TensorSource):
    """Equal parts laid one after another along `dim` (0 or 1)."""

    def __init__(self, parts: Sequence[TensorSource], dim: int) -> None:
        first = parts[0]
        _require_alike(parts)
        require_dims(first, dim + 1)
        self.name, self.dtype, self.origin = first.name, first.dtype, first.origin
        size = len(parts) * first.shape[dim]
        self.shape = (*first.shape[:dim], size, *first.shape[dim + 1 :])
        self.parts, self.dim = tuple(parts), dim

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = self.row_span(start, stop)
        if self.dim == 1:
            return torch.cat([part.rows(start, stop) for part in self.parts], dim=1)
        height = self.parts[0].shape[0]
        blocks = []
        for index, part in enumerate(self.parts):
            low, high = max(start - index * height, 0), min(stop - index * height, height)
            if low < high:
                blocks.append(part.rows(low, high))
        return torch.cat(blocks) if blocks else self.parts[0].rows(0, 0)


class Viewed(TensorSource):
    """The same bytes as another dtype of the same width."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        assert dtype.itemsize == source.dtype.itemsize
        self.name, self.shape, self.origin = source.name, source.shape, source.origin
        self.source, self.dtype = source, dtype

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.source.rows(start, stop).view(self.dtype)


class Agreed(TensorSource):
    """A small tensor that every rank has a copy of; copies that differ are refused."""

    def __init__(self, copies: Sequence[TensorSource]) -> None:
        first = copies[0]
        _require_alike(copies)
        self.name, self.shape, self.dtype = first.name, first.shape, first.dtype
        self.origin, self.copies = first.origin, tuple(copies)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        value = self.copies[0].rows(start, stop)
        for copy in self.copies[1:]:
            if not torch.equal(copy.rows(start, stop), value):
                raise CheckpointError(
                    f"{copy.origin}: tensor {copy.name!r} differs from the one in {self.origin} "
                    "although no rank has a part of it; convert the model again for all ranks at "
                    "once"
                )
        return value


def require_dims(source: TensorSource, least: int) -> None:
    """Raise CheckpointError unless the tensor has `least` dimensions, none of them empty."""
    if len(source.shape) < least or 0 in source.shape:
        raise CheckpointError(
            f"{source.origin}: tensor {source.name!r} has shape {list(source.shape)} where one of "
            f"at least {least} dimensions is needed; convert the model again"
        )


def _require_alike(parts: Sequence[TensorSource]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                f"{part.origin}: tensor {part.name!r} with shape {list(part.shape)} and "
                f"{part.dtype} does not fit the one in {first.origin} with shape "
                f"{list(first.shape)} and {first.dtype}; use the files of one conversion"
            )
