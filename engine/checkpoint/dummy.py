"""A checkpoint that does not exist: seeded random weights, for sizing and benchmarks."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from engine.checkpoint.base import HEAD, Checkpoint, TensorSource, canonical_shapes
from engine.config import ModelConfig

_ROWS = 256
_STD = 0.02


class DummySource(TensorSource):
    """Normal(0, 0.02) weights, norms all ones; any slice reads the same values every time."""

    def __init__(self, name: str, shape: tuple[int, ...]):
        self.name, self.shape = name, shape
        self.dtype, self.origin = torch.bfloat16, "dummy weights"

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.shape[0] if stop is None else stop
        if len(self.shape) == 1:
            return torch.ones(stop - start, dtype=self.dtype)
        first = start // _ROWS
        chunks = [self._chunk(index) for index in range(first, -(-stop // _ROWS))]
        return torch.cat(chunks)[start - first * _ROWS : stop - first * _ROWS].contiguous()

    def _chunk(self, index: int) -> Tensor:
        seed = zlib.crc32(f"{self.name}/{index}".encode())
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(_ROWS, self.shape[1], generator=generator)
        return (values * _STD).to(self.dtype)


def open_dummy(config: ModelConfig) -> Checkpoint:
    """Random bfloat16 weights for `config`."""
    shapes = canonical_shapes(config)
    if config.tie_word_embeddings:
        del shapes[HEAD]
    sources = {name: DummySource(name, shape) for name, shape in shapes.items()}
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return Checkpoint("dummy weights", config, sources, generation=generation)
