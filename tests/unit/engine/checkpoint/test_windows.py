"""Windows, joins and views against torch's own slicing of the whole matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.checkpoint.base import TensorSource
from engine.checkpoint.windows import Agreed, Joined, Viewed, Window
from engine.errors import CheckpointError
from engine.mapping import Span

WHOLE = torch.arange(48).reshape(8, 6)


class Held(TensorSource):
    def __init__(self, tensor: Tensor, origin: str = "rank0"):
        self.name, self.origin = "t", origin
        self.shape, self.dtype, self.tensor = tuple(tensor.shape), tensor.dtype, tensor

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = self.row_span(start, stop)
        return self.tensor[start:stop].clone()


@pytest.mark.parametrize("start, stop", [(0, 3), (1, 2), (2, 2), (0, None)])
def test_windows(start, stop):
    rows = Window(Held(WHOLE), 0, Span(2, 5))
    cols = Window(Held(WHOLE), 1, Span(1, 4))
    assert rows.shape == (3, 6)
    assert cols.shape == (8, 3)
    assert torch.equal(rows.rows(start, stop), WHOLE[2:5][start:stop])
    assert torch.equal(cols.rows(start, stop), WHOLE[:, 1:4][start:stop])
    assert cols.rows().is_contiguous()


@pytest.mark.parametrize("start, stop", [(0, 8), (3, 5), (4, 8), (5, 5), (0, None)])
@pytest.mark.parametrize("dim", [0, 1])
def test_joins(dim, start, stop):
    joined = Joined([Held(part) for part in WHOLE.chunk(2, dim)], dim)
    assert joined.shape == (8, 6)
    assert torch.equal(joined.rows(start, stop), WHOLE[start:stop])


def test_vectors_are_joined():
    joined = Joined([Held(WHOLE[0]), Held(WHOLE[1])], 0)
    assert joined.read().tolist() == list(range(12))


def test_views():
    bytes_ = torch.tensor([[-1, 2]], dtype=torch.int8)
    assert Viewed(Held(bytes_), torch.uint8).read().tolist() == [[255, 2]]


def test_parts_of_two_conversions():
    with pytest.raises(CheckpointError, match=r"^rank1: tensor 't' with shape \[4, 6\] .* rank0"):
        Joined([Held(WHOLE), Held(WHOLE[:4], "rank1")], 0)


def test_copies_that_differ():
    one, other = Held(WHOLE[0].clone()), Held(WHOLE[1].clone(), "rank1")
    assert torch.equal(Agreed([one, one]).read(), WHOLE[0])
    with pytest.raises(CheckpointError, match="^rank1: tensor 't' differs from the one in rank0"):
        Agreed([one, other]).read()
