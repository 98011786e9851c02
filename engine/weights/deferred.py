"""Linear weights whose values come when an engine file is written, and whose shapes are known
before: the file's header lists every array first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.mapping import Span
from engine.weights.types import BLOCK_BYTES, LinearWeights


@dataclass(frozen=True)
class Deferred:
    """`sketch` is the weights on the meta device: sizes, dtypes, and which tensors there are.

    `read` yields the weights of a range of outputs as consecutive blocks of rows, alike in
    everything that does not depend on the output. It may be called again and again.
    """

    sketch: LinearWeights
    read: Callable[[Span], Iterator[LinearWeights]]

    @classmethod
    def by_loading(cls, sketch: LinearWeights, load: Callable[[], LinearWeights]) -> Deferred:
        """Weights that can only be had whole: each pass over them calls `load` once."""

        def read(rows: Span) -> Iterator[LinearWeights]:
            weights = load().narrow_outputs(rows)
            # An even number, so that formats with two outputs a byte can pack a block.
            step = 2 * max(1, BLOCK_BYTES // (2 * max(1, weights.inputs)))
            for start in range(0, rows.size, step):
                yield weights.narrow_outputs(Span(start, min(start + step, rows.size)))

        return cls(sketch, read)

    @property
    def outputs(self) -> int:
        return self.sketch.outputs

    @property
    def inputs(self) -> int:
        return self.sketch.inputs

    def blocks(self) -> Iterator[LinearWeights]:
        """All weights, by blocks of rows."""
        return self.read(Span(0, self.outputs))

    def narrow_outputs(self, span: Span) -> Deferred:
        def read(rows: Span) -> Iterator[LinearWeights]:
            return self.read(Span(span.start + rows.start, span.start + rows.stop))

        return Deferred(self.sketch.narrow_outputs(span), read)

    def narrow_inputs(self, span: Span) -> Deferred:
        def read(rows: Span) -> Iterator[LinearWeights]:
            return (block.narrow_inputs(span) for block in self.read(rows))

        return Deferred(self.sketch.narrow_inputs(span), read)


def defer(weights: LinearWeights | Deferred) -> Deferred:
    """`weights` that are in memory already as `Deferred`; those that are that stay."""
    if isinstance(weights, Deferred):
        return weights
    return Deferred.by_loading(weights, lambda: weights)
