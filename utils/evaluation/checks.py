"""The checks that set the exit status: accuracy of an engine, and parity with transformers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from utils.evaluation.plan import Checks
from utils.evaluation.task import Outcome
from utils.metrics import ROUGE_NAMES, ROUGE_TYPES


def find_failures(checks: Checks, outcomes: Sequence[Outcome]) -> list[str]:
    """One sentence per check that an engine fails. transformers' outcome, if any, is the first."""
    reference = next((o for o in outcomes if o.is_reference), None)
    found: list[str] = []
    for engine in outcomes:
        if engine.is_reference:
            continue
        if checks.rouge1 is not None:
            found += _check_accuracy(engine, checks.rouge1)
        if checks.parity is not None and reference is not None:
            found += _check_parity(engine, reference, checks.parity)
    return found


def mean_score(outcome: Outcome, name: str) -> float:
    return statistics.fmean(scores[name] for scores in outcome.scores)


def _check_accuracy(engine: Outcome, threshold: float) -> Iterator[str]:
    found = mean_score(engine, "rouge1")
    if found < threshold:
        yield (
            f"accuracy check failed: ROUGE-1 of {engine.name} is {found:.2f}, below "
            f"--tensorrt_llm_rouge1_threshold {threshold:g}"
        )


def _check_parity(engine: Outcome, reference: Outcome, delta: float) -> Iterator[str]:
    gaps = []
    for name in ROUGE_TYPES if engine.scores else ():
        own, other = mean_score(engine, name), mean_score(reference, name)
        if abs(own - other) > delta:
            gaps.append(
                f"{abs(own - other):.2f} points in {ROUGE_NAMES[name]} ({own:.2f}, {other:.2f})"
            )
    if engine.likelihood is not None and reference.likelihood is not None:
        own, other = engine.likelihood.perplexity, reference.likelihood.perplexity
        per_cent = 100 * abs(own - other) / other
        if per_cent > delta:
            gaps.append(f"{per_cent:.2f} % in perplexity ({own:.2f}, {other:.2f})")
    if gaps:
        yield (
            f"parity check failed: {engine.name} and transformers differ by {', '.join(gaps)}, "
            f"more than --check_parity {delta:g}"
        )
