"""ROUGE as an `evaluate` metric, so that `evaluate.load(folder)` needs no hub.

Gives the F-measure of every pair, not an average: confidence intervals need them all.
"""

from __future__ import annotations

# One import a line: `evaluate` reads them with regular expressions, to find what must be installed.
import datasets
import evaluate
from rouge_score import rouge_scorer

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class RougeMetric(evaluate.Metric):
    """ROUGE-1, 2, L and Lsum of `rouge_score`, without stemming.

    For Lsum the sentences of a text are its lines.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Overlap of words between predictions and references.",
            citation="Lin (2004), ROUGE: A Package for Automatic Evaluation of Summaries.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        """F-measures between 0 and 1, per type one for each pair."""
        scorer = rouge_scorer.RougeScorer(TYPES)
        pairs = zip(references, predictions, strict=True)
        scored = [scorer.score(reference, prediction) for reference, prediction in pairs]
        return {name: [scores[name].fmeasure for scores in scored] for name in TYPES}
