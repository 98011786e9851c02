"""A static batch that decodes on the device: the host starts steps and reads results late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from engine.decoding import Beam
from engine.graph import DecodeLoop, Rows, run_ahead
from engine.sampling import SamplingParams
from engine.static_batch import StaticBatch

# The loop whose state a step changes, with what the given one holds, and what starts a step.
Prepare = Callable[[DecodeLoop], tuple[DecodeLoop, Callable[[], None]]]


class GraphedBatch(StaticBatch):
    """Greedy or sampled requests without beams, on ranks that all have the logits.

    Every rank chooses tokens itself, from the same logits, so none waits for another's choice.
    `prepare` captures the step of a loop, or finds one captured before.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        vocab_size: int,
        prepare: Prepare,
        **options: Any,
    ):
        self._loop: DecodeLoop | None = None
        super().__init__(prompts, 1, decoder=_LateResults(self), **options)
        self._params, self._vocab_size, self._prepare = params, vocab_size, prepare

    @property
    def is_finished(self) -> bool:
        """Waits for the device."""
        return self._loop is not None and int(self._loop.num_alive) == 0

    def run(self) -> Iterator[None]:
        logits_BV = self.prefill()
        assert logits_BV is not None, "the last pipeline stage decodes"
        loop = DecodeLoop(
            Rows(self._params, self._prompts, self._reserve()),
            vocab_size=self._vocab_size,
            packer=self._packer,
        )
        loop.choose(logits_BV)
        self._loop = loop
        yield
        if loop.steps:
            # Capturing a step takes longer than many prompts do: the first tokens are out before.
            self._loop, replay = self._prepare(loop)
            yield from run_ahead(self._loop, replay)

    def _reserve(self) -> Tensor:
        """Blocks for all tokens to come: nothing is allocated between steps."""
        tables = self._packer.tables
        for row, params in enumerate(self._params):
            tables.append(row, params.max_new_tokens)
        return tables.table()

    def late_results(self) -> list[tuple[Beam, ...]]:
        assert self._loop is not None, "nothing has been computed yet"
        return self._loop.results()


class _LateResults:
    """The decoder of a batch whose choices are made on the device."""

    beams = 1

    def __init__(self, batch: GraphedBatch):
        self._batch = batch

    def step(self, logits_RV: Any) -> Any:
        raise AssertionError("tokens are chosen on the device")

    def results(self) -> list[tuple[Beam, ...]]:
        return self._batch.late_results()
