"""A checkpoint that does not exist: seeded random weights, for sizing and benchmarks.

One block of normal numbers is drawn, and every matrix is read out of it as an endless loop from a
starting point that its name gives. The block's length is a prime, so that no row of a matrix
repeats another, but matrices are shifted copies of the same numbers and no independent draws. So
reading them costs no more than copying memory.
"""

from __future__ import annotations

import zlib
from functools import cache

import torch
from torch import Tensor

from engine.checkpoint.base import HEAD, Checkpoint, TensorSource, canonical_shapes
from engine.config import ModelConfig

# The largest prime below 2**21: 4 MiB of bfloat16, which stay in a processor's cache.
BLOCK_ELEMENTS = 2_097_143
_STD = 0.02
_SEED = 1


@cache
def _block() -> Tensor:
    """Normal(0, 0.02) numbers, bfloat16 [BLOCK_ELEMENTS]."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(BLOCK_ELEMENTS, generator=generator).mul_(_STD).to(torch.bfloat16)


class DummySource(TensorSource):
    """Normal(0, 0.02) weights, norms all ones; any slice reads the same values every time."""

    def __init__(self, name: str, shape: tuple[int, ...]):
        self.name, self.shape = name, shape
        self.dtype, self.origin = torch.bfloat16, "dummy weights"

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = self.row_span(start, stop)
        if len(self.shape) == 1:
            return torch.ones(stop - start, dtype=self.dtype)
        width = self.shape[1]
        values = torch.empty((stop - start) * width, dtype=self.dtype)
        block = _block()
        position = (zlib.crc32(self.name.encode()) + start * width) % BLOCK_ELEMENTS
        filled = 0
        while filled < len(values):
            piece = block[position : position + len(values) - filled]
            values[filled : filled + len(piece)] = piece
            filled, position = filled + len(piece), 0
        return values.view(-1, width)


def open_dummy(config: ModelConfig) -> Checkpoint:
    """Random bfloat16 weights for `config`."""
    shapes = canonical_shapes(config)
    if config.tie_word_embeddings:
        del shapes[HEAD]
    sources = {name: DummySource(name, shape) for name, shape in shapes.items()}
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return Checkpoint("dummy weights", config, sources, generation=generation)
