"""Sampled requests that must give the same text in every company and layout."""

from __future__ import annotations

from tests.golden import truth
from tests.golden.asking import Question

_PROMPTS = truth.cut_prompts((12, 30, 12, 3), start=5000)
_SETTINGS = (
    {"top_k": 50, "top_p": 0.9, "temperature": 0.8, "random_seed": 7},
    {"top_k": 0, "top_p": 0.7, "random_seed": 7},
    {"top_k": 0, "temperature": 1.3, "repetition_penalty": 1.2, "random_seed": 2**32 - 1},
    {"top_k": 5, "min_p": 0.05, "random_seed": 0},
)

SAMPLED = Question(
    _PROMPTS,
    [{"max_new_tokens": 32, "end_ids": truth.END_IDS, **fields} for fields in _SETTINGS],
)
