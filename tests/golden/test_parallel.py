"""Every layout of ranks gives transformers' tokens, logits and beams, under a real mpirun."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.golden.asking import ask, ask_ranks, assert_close, question
from tests.golden.beam_cases import beam_question, check_beams
from tests.golden.conftest import NEW_TOKENS, NUM_SCORED
from tests.golden.sampling_cases import SAMPLED
from tests.golden.truth import END_IDS, TINY_YI

pytestmark = [pytest.mark.slow, pytest.mark.mpi, pytest.mark.usefixtures("one_thread")]


class Layout(NamedTuple):
    """Ranks, flags of build.py, and how much to ask: ranks in excess of cores wait a lot."""

    ranks: int
    flags: str
    beams: tuple[int, ...] = ()
    samples: bool = False
    prompts: int | None = None
    new_tokens: int = NEW_TOKENS


# tp 4 exceeds tiny-yi's two KV heads; pp 4 cuts its six layers into 2, 2, 1 and 1.
LAYOUTS = {
    "2x1": Layout(2, "--tp_size 2 --max_batch_size 32", beams=(4,), samples=True),
    "4x1": Layout(4, "--tp_size 4 --max_batch_size 32"),
    "1x2": Layout(2, "--pp_size 2 --max_batch_size 32", beams=(2,), samples=True),
    "1x3": Layout(3, "--pp_size 3 --max_batch_size 9"),
    "2x2": Layout(
        4,
        "--tp_size 2 --pp_size 2 --max_batch_size 20 --max_num_tokens 300 --paged_kv_cache "
        "--tokens_per_block 16",
        beams=(4,),
    ),
    "1x4": Layout(4, "--pp_size 4 --max_batch_size 32", prompts=6, new_tokens=16),
    "4x1, table cut by vocabulary": Layout(
        4,
        "--tp_size 4 --max_batch_size 32 --use_parallel_embedding --embedding_sharding_dim 0",
        prompts=6,
        new_tokens=16,
    ),
    "4x1, table cut by width": Layout(
        4,
        "--tp_size 4 --max_batch_size 32 --use_parallel_embedding --embedding_sharding_dim 1",
        prompts=6,
        new_tokens=16,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_ranks_agree_with_transformers(layout, tiny, build, open_built, device, tmp_path):
    prompts = tiny.prompts[: layout.prompts]
    asked = {
        "greedy": question(prompts, max_new_tokens=layout.new_tokens, end_ids=END_IDS),
        "scores": question(prompts[:NUM_SCORED], score=True),
    }
    asked |= {f"{beams} beams": beam_question(beams) for beams in layout.beams}
    if layout.samples:
        asked["samples"] = SAMPLED
    engine = build(TINY_YI, *layout.flags.split(), "--max_beam_width", "4")
    found = ask_ranks(layout.ranks, engine, asked, tmp_path, device)

    truth = [answer.first(layout.new_tokens) for answer in tiny.answers[: layout.prompts]]
    assert found["greedy"].best == [answer.tokens for answer in truth]
    assert_close(found["greedy"].logits, [answer.logits_NV for answer in truth])
    assert_close(found["scores"].logits, tiny.scores[: len(prompts)])
    for beams in layout.beams:
        check_beams(found[f"{beams} beams"], beams)
    if layout.samples:
        alone = open_built(TINY_YI, "--max_batch_size", "1", device=device)
        assert found["samples"].best == ask(alone, SAMPLED).best
