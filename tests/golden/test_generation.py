"""Greedy decoding on one rank: tokens and logits are transformers', however a batch is made up."""

from __future__ import annotations

import shutil

import pytest
import torch

from engine.backends import open_engine
from engine.comm import World
from engine.kernels.triton import _tactics
from engine.sampling import SamplingParams
from engine.tactics import CACHE_NAME, read_cache
from tests.golden.asking import ask, assert_close, question
from tests.golden.conftest import HAS_GPU, NEW_TOKENS, NUM_SCORED
from tests.golden.truth import END_IDS, TINY_YI

pytestmark = pytest.mark.usefixtures("one_thread")

# What must not change an answer.
VARIANTS = {
    "contiguous": "--max_batch_size 32",
    "few rows": "--max_batch_size 5",
    "alone": "--max_batch_size 1",
    "paged 4": "--max_batch_size 32 --paged_kv_cache --tokens_per_block 4",
    "paged 16": "--max_batch_size 7 --paged_kv_cache --tokens_per_block 16",
    "chunks of 7": "--max_batch_size 32 --max_num_tokens 7",
    "chunks of 50": "--max_batch_size 4 --max_num_tokens 50",
    "paged 4, chunks of 13": (
        "--max_batch_size 6 --max_num_tokens 13 --paged_kv_cache --tokens_per_block 4"
    ),
    "paged 16, chunks of 128": (
        "--max_batch_size 32 --max_num_tokens 128 --paged_kv_cache --tokens_per_block 16"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_greedy(flags, tiny, open_built, device):
    session = open_built(TINY_YI, *flags.split(), device=device)
    asked = question(tiny.prompts, max_new_tokens=NEW_TOKENS, end_ids=END_IDS)
    answers = ask(session, asked)
    assert answers.best == tiny.tokens
    assert_close(answers.logits, tiny.logits)
    scored = ask(session, question(tiny.prompts[:NUM_SCORED], score=True))
    assert_close(scored.logits, tiny.scores)


@pytest.mark.parametrize(
    "flags", ["", "--paged_kv_cache --tokens_per_block 16"], ids=["contiguous", "paged"]
)
def test_larger_and_smaller_batches_in_turn(flags, tiny, open_built, device):
    """The cache grows between them; on a GPU captured steps go with the cache they belong to."""
    session, steps = open_built(TINY_YI, *flags.split(), device=device), 20
    for rows in (slice(0, 1), slice(2, 8), slice(0, 1), slice(8, 10), slice(3, 5)):
        prompts = tiny.prompts[rows]
        params = [SamplingParams(max_new_tokens=steps, end_ids=END_IDS)] * len(prompts)
        found = [list(result.beams[0].tokens) for result in session.generate(prompts, params)]
        assert found == [tokens[:steps] for tokens in tiny.tokens[rows]]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")
def test_a_first_run_on_a_gpu_measures_its_kernels(tiny, build, tmp_path, monkeypatch):
    monkeypatch.setattr(_tactics, "_table", {})
    folder = shutil.copytree(build(TINY_YI), tmp_path / "engine")
    session = open_engine(folder, World(), device="cuda", tuning=True)
    known = read_cache(folder / CACHE_NAME)[torch.cuda.get_device_name()]
    assert {name.rsplit("/", 2)[0] for name in known} == {"linear/1", "linear/8"}
    params = [SamplingParams(max_new_tokens=NEW_TOKENS, end_ids=END_IDS)] * 3
    found = session.generate(tiny.prompts[:3], params)
    assert [list(result.beams[0].tokens) for result in found] == tiny.tokens[:3]
