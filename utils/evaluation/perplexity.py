"""Perplexity per token: text in windows that do not overlap, nothing before a window.

Every token but the first of each window is predicted, as models/tiny-yi/evaluate.py does it, so
that figures of engines, of transformers and of that script can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from utils.evaluation.task import Ids, Likelihood

if TYPE_CHECKING:
    from torch import Tensor

    from engine.session import Session

WINDOW = 512
# Logits held at a time: fp32, every position of the windows that are scored together.
MAX_LOGIT_BYTES = 2**28

# Logits [S, V] of each window.
ScoreWindows = Callable[[Sequence[Ids]], "Iterable[Tensor]"]


def cut_windows(tokens: Sequence[int], window: int = WINDOW) -> list[Ids]:
    """Consecutive windows of `tokens`; a rest of one token predicts nothing and is left out."""
    cut = (tuple(tokens[start : start + window]) for start in range(0, len(tokens), window))
    return [ids for ids in cut if len(ids) > 1]


def perplexity(session: Session, tokens: Sequence[int], *, window: int = WINDOW) -> float:
    """Of a text's token ids, by an engine of any kind; every rank of its job calls it."""
    return engine_likelihood(session, cut_windows(tokens, window)).perplexity


def engine_likelihood(session: Session, windows: Sequence[Ids]) -> Likelihood:
    return sum_likelihood(session.score, windows, session.info.config.vocab_size)


def sum_likelihood(score: ScoreWindows, windows: Sequence[Ids], vocab_size: int) -> Likelihood:
    """Over all windows; as many go to one call of `score` as MAX_LOGIT_BYTES allows."""
    import torch

    nll, tokens = 0.0, 0
    for group in group_windows(windows, vocab_size):
        for ids, logits_SV in zip(group, score(group), strict=True):
            targets_S = torch.tensor(ids[1:], device=logits_SV.device)
            losses_S = torch.nn.functional.cross_entropy(
                logits_SV[:-1].float(), targets_S, reduction="none"
            )
            nll += losses_S.double().sum().item()
            tokens += len(ids) - 1
    return Likelihood(nll, tokens)


def group_windows(windows: Sequence[Ids], vocab_size: int) -> Iterator[list[Ids]]:
    """Neighbours of the same length, as many as MAX_LOGIT_BYTES of logits allow, at least one."""
    group: list[Ids] = []
    for ids in windows:
        room = MAX_LOGIT_BYTES // (4 * vocab_size * len(ids))
        if group and (len(ids) != len(group[0]) or len(group) >= room):
            yield group
            group = []
        group.append(ids)
    if group:
        yield group
