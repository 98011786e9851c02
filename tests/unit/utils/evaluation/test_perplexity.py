"""Windows and summed likelihoods, by hand; what an engine and transformers give is golden's."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from utils.evaluation import perplexity as module
from utils.evaluation.perplexity import (
    cut_windows,
    engine_likelihood,
    group_windows,
    perplexity,
    sum_likelihood,
)

VOCABULARY = 8


class CountingSession:
    """Gives the next number twice the odds of each other one."""

    def __init__(self):
        self.info = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCABULARY))
        self.calls: list[int] = []

    def score(self, windows):
        self.calls.append(len(windows))
        return [self._logits(window) for window in windows]

    def _logits(self, window) -> torch.Tensor:
        logits_SV = torch.zeros(len(window), VOCABULARY)
        for place, token in enumerate(window):
            logits_SV[place, (token + 1) % VOCABULARY] = math.log(2)
        return logits_SV


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, []), (1, []), (2, [2]), (4, [4]), (9, [4, 4]), (10, [4, 4, 2])]
)
def test_windows_do_not_overlap_and_predict_something(count, sizes):
    windows = cut_windows(range(count), 4)
    assert [len(window) for window in windows] == sizes
    assert [token for window in windows for token in window] == list(range(sum(sizes)))


def test_likelihood_by_hand():
    """A counted-up token has probability 2/9, another one 1/9."""
    nll, tokens = engine_likelihood(CountingSession(), [(0, 1, 2, 5), (3, 3)])
    assert tokens == 4
    assert nll == pytest.approx(-2 * math.log(2 / 9) - 2 * math.log(1 / 9))


def test_perplexity_of_ids():
    assert perplexity(CountingSession(), [i % VOCABULARY for i in range(30)], window=8) == (
        pytest.approx(9 / 2)
    )


def test_few_logits_are_held_at_a_time(monkeypatch):
    """Three windows of four positions fit; a shorter one does not join longer ones."""
    monkeypatch.setattr(module, "MAX_LOGIT_BYTES", 3 * 4 * VOCABULARY * 4 + 1)
    session, windows = CountingSession(), [(1, 2, 3, 4)] * 7 + [(1, 2)]
    together = engine_likelihood(session, windows)
    assert session.calls == [3, 3, 1, 1]
    alone = [sum_likelihood(session.score, [window], VOCABULARY) for window in windows]
    assert together.nll == pytest.approx(sum(one.nll for one in alone))
    assert together.tokens == sum(one.tokens for one in alone) == 22


def test_a_window_larger_than_the_allowance_goes_alone(monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGIT_BYTES", 1)
    assert list(group_windows([(1, 2), (3, 4)], VOCABULARY)) == [[(1, 2)], [(3, 4)]]
