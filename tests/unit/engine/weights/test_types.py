"""Lazy windows against slicing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.checkpoint.base import TensorSource
from engine.mapping import Span
from engine.weights.types import BLOCK_BYTES, Dense, Lazy


class Memory(TensorSource):
    """A tensor in memory that counts how many bytes each read takes."""

    def __init__(self, tensor: Tensor):
        self.name, self.origin = "w", "memory"
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), tensor.dtype
        self.read_bytes: list[int] = []

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        assert 0 <= start <= (stop or 0) <= self.shape[0]
        block = self.tensor[start:stop].clone()
        self.read_bytes.append(block.nbytes)
        return block


MATRIX = torch.arange(7 * 5, dtype=torch.float32).view(7, 5)


@pytest.mark.parametrize("block_bytes", [1, 20, 47, 60, 1000])
@pytest.mark.parametrize("cols", [(0, 5), (1, 4), (4, 5)])
@pytest.mark.parametrize("rows", [(0, 7), (2, 5), (6, 7)])
def test_window_equals_slice(rows, cols, block_bytes):
    lazy = Lazy.whole(Memory(MATRIX)).narrow_rows(Span(*rows)).narrow_cols(Span(*cols))
    blocks = list(lazy.blocks(block_bytes))
    expected = MATRIX[slice(*rows), slice(*cols)]
    assert lazy.shape == tuple(expected.shape)
    assert all(block.is_contiguous() for block in blocks)
    assert torch.equal(torch.cat(blocks), expected)
    assert torch.equal(lazy.read(), expected)


def test_windows_of_windows_add_up():
    lazy = Lazy.whole(Memory(MATRIX)).narrow_rows(Span(1, 6)).narrow_rows(Span(2, 4))
    lazy = lazy.narrow_cols(Span(1, 5)).narrow_cols(Span(1, 3))
    assert torch.equal(lazy.read(), MATRIX[3:5, 2:4])


@pytest.mark.parametrize("rows, kept", [((5, 9), 2), ((7, 10), 0), ((8, 9), 0)])
def test_rows_past_the_end_are_zeros(rows, kept):
    read = Lazy.whole(Memory(MATRIX)).narrow_rows(Span(*rows)).narrow_cols(Span(0, 3)).read()
    assert read.shape == (rows[1] - rows[0], 3)
    assert torch.equal(read[:kept], MATRIX[rows[0] :, :3])
    assert torch.count_nonzero(read[kept:]) == 0


def test_vector():
    lazy = Lazy.whole(Memory(MATRIX[0]))
    assert lazy.shape == (5,)
    assert torch.equal(lazy.read(), MATRIX[0])
    assert torch.equal(lazy.narrow_rows(Span(1, 3)).read(), MATRIX[0, 1:3])


def test_one_block_is_read_at_a_time():
    source = Memory(torch.zeros(64, 1 << 18))
    assert BLOCK_BYTES == 8 << 20
    for _ in Lazy.whole(source).blocks():
        pass
    assert source.read_bytes == [8 << 20] * 8


def test_rows_wider_than_a_block_are_read_one_by_one():
    source = Memory(torch.zeros(3, 100))
    assert [block.shape[0] for block in Lazy.whole(source).blocks(block_bytes=64)] == [1, 1, 1]


def test_dense_narrows_like_a_matrix():
    dense = Dense(Lazy.whole(Memory(MATRIX)))
    assert (dense.outputs, dense.inputs) == (7, 5)
    part = dense.narrow_outputs(Span(2, 4)).narrow_inputs(Span(0, 3))
    assert (part.outputs, part.inputs) == (2, 3)
    assert torch.equal(part.weight_NK.read(), MATRIX[2:4, :3])
