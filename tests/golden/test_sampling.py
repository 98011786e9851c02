"""Samples follow transformers' distribution and depend on nothing but the request."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.golden import truth
from tests.golden.asking import Question, ask
from tests.golden.sampling_cases import SAMPLED
from tests.golden.truth import TINY_YI

pytestmark = pytest.mark.usefixtures("one_thread")

DRAWS, BATCH = 2000, 500
TOP_K, TOP_P, TEMPERATURE = 12, 0.9, 1.5


def test_company_changes_no_sample(open_built, device):
    together = ask(open_built(TINY_YI, "--max_batch_size", "32", device=device), SAMPLED)
    session = open_built(TINY_YI, "--max_batch_size", "1", device=device)
    alone = [
        ask(session, Question([prompt], [fields])).best[0]
        for prompt, fields in zip(SAMPLED.prompts, SAMPLED.params, strict=True)
    ]
    assert together.best == alone
    other_seeds = [{**fields, "random_seed": 99} for fields in SAMPLED.params]
    for one, other in zip(
        alone, ask(session, replace(SAMPLED, params=other_seeds)).best, strict=True
    ):
        assert one != other


def test_first_tokens_follow_the_warped_distribution(open_built, device):
    [prompt] = truth.cut_prompts((3,), start=7000)
    logits_1V = truth.score(truth.load_model(TINY_YI), prompt)[-1:]
    warp = LogitsProcessorList(
        [TemperatureLogitsWarper(TEMPERATURE), TopKLogitsWarper(TOP_K), TopPLogitsWarper(TOP_P)]
    )
    expected_V = DRAWS * warp(torch.tensor([prompt]), logits_1V).softmax(-1)[0]

    fields = {"max_new_tokens": 1, "top_k": TOP_K, "top_p": TOP_P, "temperature": TEMPERATURE}
    session = open_built(TINY_YI, "--max_batch_size", str(BATCH), device=device)
    seeds = [{**fields, "end_ids": (), "random_seed": seed} for seed in range(DRAWS)]
    drawn = ask(session, Question([prompt] * DRAWS, seeds)).best
    counts_V = torch.tensor([tokens[0] for tokens in drawn]).bincount(minlength=len(expected_V))

    possible = expected_V > 0
    assert counts_V[~possible].sum() == 0
    freedom = possible.sum().item() - 1
    assert freedom >= 4 and expected_V[possible].min() > 5
    chi_square = ((counts_V - expected_V) ** 2 / expected_V)[possible].sum().item()
    # Five standard deviations above the mean of the chi-square distribution.
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
