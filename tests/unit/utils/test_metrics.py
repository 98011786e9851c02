"""ROUGE against arithmetic by hand and rouge_score itself; intervals against the normal law."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score import rouge_scorer

from utils.metrics import ROUGE_TYPES, Rouge, bootstrap, split_sentences


@pytest.fixture(scope="module")
def rouge() -> Rouge:
    return Rouge()


def test_scores_by_hand(rouge):
    """3 of 3 predicted words are among 6: P 1, R 1/2. Of pairs 2 of 2 among 5: P 1, R 2/5."""
    [scores] = rouge.score(["The cat sat"], ["the cat sat on the mat."])
    assert scores == pytest.approx(
        {"rouge1": 200 / 3, "rouge2": 400 / 7, "rougeL": 200 / 3, "rougeLsum": 200 / 3}
    )


def test_sum_looks_at_sentences_in_any_order(rouge):
    """All five words are there; in order only 'a dog ran' is; sentence by sentence all are."""
    [scores] = rouge.score(["A dog ran. It rained."], ["It rained. A dog ran."])
    assert scores["rouge1"] == scores["rougeLsum"] == 100
    assert scores["rougeL"] == pytest.approx(60)


def test_pairs_are_scored_one_by_one(rouge):
    predictions = ["one two three", "", "nothing in common", "x"]
    references = ["three two one", "empty", "all others", "x"]
    found = rouge.score(predictions, references)
    scorer = rouge_scorer.RougeScorer(ROUGE_TYPES)
    for scores, prediction, reference in zip(found, predictions, references, strict=True):
        truth = scorer.score(reference, prediction)
        assert scores == pytest.approx({t: 100 * truth[t].fmeasure for t in ROUGE_TYPES})
        assert all(isinstance(value, float) for value in scores.values())


def test_words_are_not_stemmed(rouge):
    assert rouge.score(["runs"], ["running"])[0]["rouge1"] == 0


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("One. Two! Three?  Four", "One.\nTwo!\nThree?\nFour"),
        (" At 3.5 % it stays.\nNext ", "At 3.5 % it stays.\nNext"),
        ("", ""),
    ],
)
def test_sentences(text, split):
    assert split_sentences(text) == split


def test_interval_of_equal_values_is_a_point():
    assert bootstrap([2.5] * 9) == (2.5, 2.5, 2.5)


def test_interval_follows_the_normal_law():
    values = np.random.default_rng(1).normal(30, 5, size=400)
    mean, low, high = bootstrap(values.tolist())
    error = values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)


def test_interval_is_reproducible_however_it_is_cut(monkeypatch):
    values = np.random.default_rng(2).random(50).tolist()
    whole = bootstrap(values)
    assert bootstrap(values) == whole
    monkeypatch.setattr("utils.metrics._MAX_INDICES", 1000)
    assert bootstrap(values) == whole
