"""Beam search is transformers', whatever the cache looks like."""

from __future__ import annotations

import pytest

from tests.golden.asking import ask
from tests.golden.beam_cases import NEW_TOKENS, beam_question, check_beams, true_beams
from tests.golden.truth import TINY_YI

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CACHES = {
    "contiguous": "--max_batch_size 32",
    "paged 4": "--max_batch_size 5 --paged_kv_cache --tokens_per_block 4",
    "paged 16, in chunks": (
        "--max_batch_size 32 --max_num_tokens 20 --paged_kv_cache --tokens_per_block 16"
    ),
}


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("flags", CACHES.values(), ids=CACHES)
def test_beams(flags, beams, open_built, device):
    session = open_built(TINY_YI, *flags.split(), "--max_beam_width", "4", device=device)
    check_beams(ask(session, beam_question(beams)), beams)


@pytest.mark.parametrize("beams", [2, 4])
def test_searches_end_in_both_ways(beams):
    lengths = [len(found.tokens) for one in true_beams(beams) for found in one]
    assert min(lengths) < NEW_TOKENS - 1
    assert max(lengths) == NEW_TOKENS
