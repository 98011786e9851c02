"""How far two sides give the same tokens, and how unlike they are where they part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from utils.evaluation.task import Agreement, Divergence, Ids

if TYPE_CHECKING:
    from torch import Tensor


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens before the first that differs."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def find_divergences(answers: Sequence[Ids], references: Sequence[Ids]) -> list[Divergence]:
    """Of the cases whose answers differ; an answer that ends earlier differs by its end token."""
    return [
        Divergence(case, shared_prefix(answer, reference))
        for case, (answer, reference) in enumerate(zip(answers, references, strict=True))
        if answer != reference
    ]


def kl_divergence(reference_V: Tensor, other_V: Tensor) -> float:
    """KL(reference ‖ other) in nats between the distributions that two rows of logits mean."""
    p, q = (logits.double().log_softmax(-1) for logits in (reference_V, other_V))
    return (p.exp() * (p - q)).sum().item()


def summarise_agreement(
    answers: Sequence[Ids],
    references: Sequence[Ids],
    *,
    parting: Mapping[Divergence, Tensor],
    reference_parting: Mapping[Divergence, Tensor],
) -> Agreement:
    """`parting` and `reference_parting` are logits [V] of divergences, each side's own; only those
    that both have count for the KL divergence."""
    divergences = find_divergences(answers, references)
    lost = {d.case: d.prefix for d in divergences}
    matched = sum(lost.get(case, len(reference)) for case, reference in enumerate(references))
    both = [d for d in divergences if d in parting and d in reference_parting]
    kls = [kl_divergence(reference_parting[d], parting[d]) for d in both]
    return Agreement(
        cases=len(references),
        identical=len(references) - len(divergences),
        matched=matched,
        reference_tokens=sum(map(len, references)),
        first=min(lost.values(), default=None),
        kl=sum(kls) / len(kls) if kls else None,
        kl_cases=len(kls),
    )
