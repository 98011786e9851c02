"""Beam searches and what transformers finds, for engines of every cache and layout."""

from __future__ import annotations

from functools import cache

import pytest

from tests.golden import truth
from tests.golden.asking import Answers, Question
from tests.golden.truth import Found

# The full stop ends a hypothesis: some are over early, others run to their full length.
END_IDS = (4026,)
NEW_TOKENS = 20
PROMPTS = truth.cut_prompts((5, 34, 12), start=3000)

# Our early_stopping is TensorRT-LLM's number; theirs is a truth value or a word.
STOPPING = {1: True, 0: False, 2: "never"}
# Length penalties and early_stopping; requests of one batch differ in them.
WISHES = ((0.5, 1), (0.5, 2), (1.0, 0), (1.0, 1), (2.0, 0), (2.0, 2))


def beam_question(beams: int) -> Question:
    """Every prompt with every wish."""
    cases = [(prompt, wish) for prompt in PROMPTS for wish in WISHES]
    return Question(
        [prompt for prompt, _ in cases],
        [
            {
                "max_new_tokens": NEW_TOKENS,
                "end_ids": END_IDS,
                "num_beams": beams,
                "length_penalty": length_penalty,
                "early_stopping": early_stopping,
            }
            for _, (length_penalty, early_stopping) in cases
        ],
    )


@cache
def true_beams(beams: int) -> list[list[Found]]:
    """The hypotheses of each request of `beam_question`."""
    model = truth.load_model(truth.TINY_YI)
    return [
        truth.search_beams(
            model,
            prompt,
            NEW_TOKENS,
            END_IDS,
            beams=beams,
            length_penalty=length_penalty,
            early_stopping=STOPPING[early_stopping],
        )
        for prompt in PROMPTS
        for length_penalty, early_stopping in WISHES
    ]


def check_beams(answers: Answers, beams: int) -> None:
    expected = true_beams(beams)
    assert answers.tokens == [[found.tokens for found in one] for one in expected]
    for log_probs, found in zip(answers.log_probs, expected, strict=True):
        assert log_probs == pytest.approx([one.log_prob for one in found], abs=1e-3)
