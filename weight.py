"""Weights for the scripts: open any source, stream one rank's tensors.

The mapping itself is data in engine/weights/table.py; the readers are in engine/checkpoint/.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from engine.checkpoint.base import Checkpoint
from engine.checkpoint.dummy import open_dummy
from engine.checkpoint.open import Paths, open_source
from engine.config import ModelConfig
from engine.mapping import Mapping
from engine.quant import KV_CODE_MAX, KVStorage, QuantConfig
from engine.weights.convert import StorePlan, stream_pieces

# Ranges of a cache that random weights are given: no calibration can find better ones.
DUMMY_KV_RANGE = 8.0


@dataclass(frozen=True)
class WeightSource:
    """Where the weights come from: the checkpoint that `paths` name, or random ones for `dummy`.

    `quant` is what the build asks for. Small and picklable, so that every process of a parallel
    build opens its own reader.
    """

    paths: Paths = Paths()
    quant: QuantConfig = QuantConfig()
    dummy: ModelConfig | None = None

    def open(self) -> Checkpoint:
        """A reader; use it as a context manager. Raises CheckpointError for what it cannot read."""
        if self.dummy is None:
            return open_source(self.paths, self.quant)
        checkpoint = open_dummy(self.dummy)
        if self.quant.kv is not KVStorage.NONE:
            scale = torch.full((1,), DUMMY_KV_RANGE / KV_CODE_MAX[self.quant.kv])
            checkpoint.give_kv_scales([(scale, scale)] * self.dummy.num_layers, self.quant.kv)
        return checkpoint

    def __str__(self) -> str:
        if self.dummy is not None:
            return "dummy weights"
        given = (value for value in astuple(self.paths) if value is not None)
        return " with ".join(given)


def load_rank(
    checkpoint: Checkpoint, plan: StorePlan, mapping: Mapping
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """(engine tensor name, its row blocks) for every array of one rank, in file order.

    Nothing is read before a block is taken, and nothing is kept.
    """
    for piece in stream_pieces(checkpoint, plan, [mapping]):
        yield piece.name, piece.blocks()
