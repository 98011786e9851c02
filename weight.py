"""Weights for the scripts: open any source, stream one rank's tensors.

The mapping itself is data in engine/weights/table.py; the readers are in engine/checkpoint/.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from engine.checkpoint.base import Checkpoint
from engine.checkpoint.dummy import open_dummy
from engine.checkpoint.open import open_checkpoint
from engine.config import ModelConfig
from engine.mapping import Mapping
from engine.weights.convert import StorePlan, stream_pieces


@dataclass(frozen=True)
class WeightSource:
    """Where the weights come from: a checkpoint directory, or random ones for `dummy`.

    Small and picklable, so that every process of a parallel build opens its own reader.
    """

    model_dir: str | None = None
    meta_ckpt_dir: str | None = None
    dummy: ModelConfig | None = None

    def open(self) -> Checkpoint:
        """A reader; use it as a context manager. Raises CheckpointError for what it cannot read."""
        if self.dummy is not None:
            return open_dummy(self.dummy)
        return open_checkpoint(model_dir=self.model_dir, meta_ckpt_dir=self.meta_ckpt_dir)

    def __str__(self) -> str:
        return self.model_dir or self.meta_ckpt_dir or "dummy weights"


def load_rank(
    checkpoint: Checkpoint, plan: StorePlan, mapping: Mapping
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """(engine tensor name, its row blocks) for every array of one rank, in file order.

    Nothing is read before a block is taken, and nothing is kept.
    """
    for piece in stream_pieces(checkpoint, plan, [mapping]):
        yield piece.name, piece.blocks()
