"""ROUGE of summaries, and how sure an average of it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

ROUGE_NAMES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
}
ROUGE_TYPES = tuple(ROUGE_NAMES)
METRIC_FOLDER = Path(__file__).parent / "rouge_metric"

RESAMPLES, SEED, CONFIDENCE = 1000, 0, 0.95
# Resampled indices held at a time, so that a whole test split needs little memory.
_MAX_INDICES = 2**22
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

Scores = dict[str, float]


class Interval(NamedTuple):
    """An average with the bounds of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


class Rouge:
    """F-measures in per cent of predictions against references."""

    def __init__(self) -> None:
        import evaluate

        self._metric = evaluate.load(str(METRIC_FOLDER), keep_in_memory=True)

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> list[Scores]:
        """ROUGE_TYPES of each pair; the sentences of both texts are told apart for Lsum."""
        found = self._metric.compute(
            predictions=[split_sentences(text) for text in predictions],
            references=[split_sentences(text) for text in references],
        )
        return [
            {name: 100.0 * found[name][place] for name in ROUGE_TYPES}
            for place in range(len(predictions))
        ]


def split_sentences(text: str) -> str:
    """`text` with a sentence a line."""
    return _SENTENCE_END.sub("\n", text.strip())


def bootstrap(values: Sequence[float]) -> Interval:
    """The mean of `values` and how far it moves when they are drawn again, with replacement.

    The bounds are percentiles of RESAMPLES means; the seed is fixed, so they are reproducible. For
    a difference between two systems on the same texts give the differences of each text.
    """
    import numpy as np

    assert values
    data = np.asarray(values, np.float64)
    means = _resample(data, np.random.default_rng(SEED))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(data.mean()), float(low), float(high))


def _resample(data: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means [RESAMPLES] of random choices of len(data) values."""
    import numpy as np

    rows = max(_MAX_INDICES // len(data), 1)
    parts = []
    for start in range(0, RESAMPLES, rows):
        shape = (min(rows, RESAMPLES - start), len(data))
        parts.append(data[generator.integers(len(data), size=shape)].mean(axis=1))
    return np.concatenate(parts)
