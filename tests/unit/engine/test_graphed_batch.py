"""Decoding on the device against the host-driven batch, step by step without a graph."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from engine.backends import open_engine
from engine.comm import World
from engine.graph import BUCKETS, pad_rows
from engine.graphed_batch import GraphedBatch
from engine.sampling import SamplingParams
from tests.cli.build_runner import SMALL_DUMMY, run_here

PROMPTS = [[5, 9, 3], [7], [11, 2, 8, 4, 6, 1, 3, 9, 30], [20, 21]]
GREEDY = SamplingParams(max_new_tokens=12, end_ids=())
SAMPLED = replace(GREEDY, top_k=8, top_p=0.9, temperature=1.5, random_seed=3)


@pytest.fixture(scope="module", params=[(), ("--paged_kv_cache", "--tokens_per_block", "4")])
def session(request, tmp_path_factory):
    output = tmp_path_factory.mktemp("engine")
    flags = (*SMALL_DUMMY, "--output_dir", output, "--dtype", "float32", *request.param)
    assert run_here(*flags, "--log_level", "error").status == 0
    return open_engine(output, World(), device="cpu")


def decode_on_device(session, prompts, params) -> list:
    """As `Session.generate`, by a GraphedBatch whose steps run one after the other."""

    class Steps:
        def prepare(self, loop, cache):
            return loop, torch.inference_mode()(partial(loop.advance, session._network, cache))

    session._graphs = Steps()
    try:
        batch = session._open_batch(prompts, params, context_logits=False, generation_logits=False)
        assert isinstance(batch, GraphedBatch)
        steps = sum(1 for _ in batch.run())
        return [steps, batch.decoder.results(), batch.is_finished]
    finally:
        session._graphs = None


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("one", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_same_as_the_host(session, rows, one):
    prompts = PROMPTS[:rows]
    params = [replace(one, random_seed=row, max_new_tokens=12 - row) for row in range(rows)]
    _, beams, is_finished = decode_on_device(session, prompts, params)
    assert is_finished
    assert beams == [result.beams for result in session.generate(prompts, params)]


def test_rows_end_for_their_own_reasons(session):
    """An end id, a stop word, the length; with log probabilities and penalties."""
    [free] = session.generate(PROMPTS[:1], [GREEDY])
    tokens = free.beams[0].tokens
    params = [
        replace(GREEDY, end_ids=(tokens[4],), log_probs=True),
        replace(GREEDY, stop_words=(tokens[2:4],), log_probs=True),
        replace(GREEDY, max_new_tokens=6, repetition_penalty=1.3, log_probs=True),
    ]
    prompts = [PROMPTS[0]] * 3
    _, beams, _ = decode_on_device(session, prompts, params)
    expected = [result.beams for result in session.generate(prompts, params)]
    for (found,), (truth,) in zip(beams, expected, strict=True):
        assert (found.tokens, found.reason) == (truth.tokens, truth.reason)
        assert found.log_probs == pytest.approx(truth.log_probs, abs=1e-5)
        assert found.cum_log_prob == pytest.approx(truth.cum_log_prob, abs=1e-4)


def test_the_host_stops_soon_after_the_last_row(session):
    [free] = session.generate(PROMPTS[:1], [GREEDY])
    params = [replace(GREEDY, end_ids=(free.beams[0].tokens[0],))]
    steps, beams, _ = decode_on_device(session, PROMPTS[:1], params)
    assert beams[0][0].tokens == ()
    assert steps < GREEDY.max_new_tokens


def test_a_used_loop_adopts_another_batch(session):
    params, batches = [GREEDY] * 2, (PROMPTS[:2], [[8, 1, 2], [4]])
    kept = {}

    class Steps:
        def prepare(self, loop, cache):
            plan = loop.plan()
            if plan in kept:
                kept[plan].adopt(loop)
                kept[plan].params = loop.params
            captured = kept.setdefault(plan, loop)
            return captured, torch.inference_mode()(
                partial(captured.advance, session._network, cache)
            )

    session._graphs = Steps()
    try:
        found = [session.generate(prompts, params) for prompts in batches]
    finally:
        session._graphs = None
    assert len(kept) == 1
    assert found == [session.generate(prompts, params) for prompts in batches]


@pytest.mark.parametrize("rows, bucket", [(1, 1), (3, 4), (5, 8), (17, 32), (33, 64), (64, 64)])
def test_buckets(rows, bucket):
    assert pad_rows(rows) == bucket
    assert rows <= bucket and (bucket in BUCKETS or bucket % BUCKETS[-1] == 0)
