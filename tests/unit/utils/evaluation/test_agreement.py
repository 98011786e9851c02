"""Prefixes, divergences and the KL divergence, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from utils.evaluation.agreement import (
    find_divergences,
    kl_divergence,
    shared_prefix,
    summarise_agreement,
)
from utils.evaluation.task import Agreement

ANSWERS = [(1, 2, 3), (4, 5, 6, 7), (), (8, 9)]
REFERENCES = [(1, 2, 3), (4, 5, 0, 7), (), (8, 9, 1)]


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [((), (), 0), ((1,), (2,), 0), ((1, 2, 3), (1, 2, 4), 2), ((1, 2), (1, 2, 3), 2)],
)
def test_shared_prefix(one, other, length):
    assert shared_prefix(one, other) == shared_prefix(other, one) == length


def test_answers_that_differ_or_end_earlier_diverge():
    assert find_divergences(ANSWERS, REFERENCES) == [(1, 2), (3, 2)]
    assert find_divergences(REFERENCES, REFERENCES) == []


def test_kl_by_hand():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    # A constant added to logits changes nothing.
    assert kl_divergence(p.log() + 3, q.log() - 1) == pytest.approx(expected)
    assert kl_divergence(p.log(), p.log()) == 0


def test_summary():
    """3 + 2 + 0 + 2 of 10 reference tokens come before a difference."""
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    d, e = find_divergences(ANSWERS, REFERENCES)
    found = summarise_agreement(
        ANSWERS, REFERENCES, parting={d: q, e: q}, reference_parting={d: p, e: q}
    )
    kl = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    assert found == Agreement(4, 2, 7, 10, 2, pytest.approx(kl), 2)


def test_logits_of_one_side_only_do_not_count():
    d, e = find_divergences(ANSWERS, REFERENCES)
    row = torch.zeros(2)
    found = summarise_agreement(
        ANSWERS, REFERENCES, parting={d: row, e: row}, reference_parting={e: row}
    )
    assert (found.kl, found.kl_cases) == (0, 1)
    found = summarise_agreement(ANSWERS, ANSWERS, parting={}, reference_parting={})
    assert found == Agreement(4, 4, 9, 9, None, None, 0)
