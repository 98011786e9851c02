"""Decoding on the device against the host-driven batch, step by step without a graph."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from engine.backends import open_engine
from engine.comm import World
from engine.graph import BUCKETS, GraphPool, pad_rows
from engine.graphed_batch import GraphedBatch
from engine.sampling import SamplingParams
from tests.cli.build_runner import SMALL_DUMMY, run_here
from tests.conftest import ROOT

PROMPTS = [[5, 9, 3], [7], [11, 2, 8, 4, 6, 1, 3, 9, 30], [20, 21]]
GREEDY = SamplingParams(max_new_tokens=12, end_ids=())
SAMPLED = replace(GREEDY, top_k=8, top_p=0.9, temperature=1.5, random_seed=3)


@pytest.fixture(scope="module", params=[(), ("--paged_kv_cache", "--tokens_per_block", "4")])
def session(request, tmp_path_factory):
    output = tmp_path_factory.mktemp("engine")
    flags = (*SMALL_DUMMY, "--output_dir", output, "--dtype", "float32", *request.param)
    assert run_here(*flags, "--log_level", "error").status == 0
    return open_engine(output, World(), device="cpu")


class Steps:
    """In place of a GraphPool: what it does with a cache that goes."""

    def clear(self) -> None:
        pass


def decode_on_device(session, prompts, params) -> list:
    """As `Session.generate`, by a GraphedBatch whose steps run one after the other."""

    class Eager(Steps):
        def prepare(self, loop, cache):
            return loop, torch.inference_mode()(partial(loop.advance, session._network, cache))

    session._graphs = Eager()
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

    class Keeping(Steps):
        def prepare(self, loop, cache):
            plan = loop.plan()
            if plan in kept:
                kept[plan].adopt(loop)
                kept[plan].params = loop.params
            captured = kept.setdefault(plan, loop)
            return captured, torch.inference_mode()(
                partial(captured.advance, session._network, cache)
            )

    session._graphs = Keeping()
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


def test_one_token_needs_no_step(session):
    class Refusing(Steps):
        def prepare(self, loop, cache):
            raise AssertionError("there is nothing to capture for")

    session._graphs = Refusing()
    params = [replace(GREEDY, max_new_tokens=1)] * 2
    try:
        found = session.generate(PROMPTS[:2], params)
    finally:
        session._graphs = None
    assert found == session.generate(PROMPTS[:2], params)


class FakeLoop:
    """A loop whose plan is its name."""

    def __init__(self, name):
        self.name, self.params, self.num_real = name, [], 0

    def plan(self):
        return self.name

    def adopt(self, other):
        assert self.name == other.name

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def advance(self, network, cache):
        pass


class FakePools:
    """torch.cuda's rule for pools: one lives as long as a graph that uses it, and is then gone."""

    def __init__(self):
        self.living, self.used, self.made = {}, [], 0

    def graph_pool_handle(self):
        self.made += 1
        self.living[self.made] = None
        return self.made

    @contextmanager
    def graph(self, graph, pool):
        count = self.living[pool]
        assert count is None or count > 0, "the pool is gone"
        self.living[pool] = (count or 0) + 1
        graph.release = partial(self.release, pool)
        self.used.append(pool)
        yield

    def release(self, pool):
        self.living[pool] -= 1


class FakeGraph:
    def replay(self):
        pass

    def __del__(self):
        self.release()


class FakeStream:
    def wait_stream(self, other):
        pass


def test_graphs_of_another_cache_have_a_pool_of_their_own(monkeypatch):
    pools = FakePools()
    for name, value in {
        "graph_pool_handle": pools.graph_pool_handle,
        "graph": pools.graph,
        "CUDAGraph": FakeGraph,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    graphs = GraphPool(network=None)
    first, second = object(), object()
    for cache, names in ((first, "aab"), (second, "ab"), (first, "a")):
        for name in names:
            graphs.prepare(FakeLoop(name), cache)
    graphs.clear()
    graphs.prepare(FakeLoop("a"), first)
    assert pools.used == [1, 1, 2, 2, 3, 4]
    assert pools.living == {1: 0, 2: 0, 3: 0, 4: 1}


def test_neighbouring_lengths_share_a_cache(session, monkeypatch):
    monkeypatch.setattr(session, "_cache", None)
    monkeypatch.setattr(session, "_cache_shape", (0, 0))

    def ask(rows, new_tokens):
        params = [replace(GREEDY, max_new_tokens=new_tokens)] * rows
        batch = session._open_batch(
            PROMPTS[:1] * rows, params, context_logits=False, generation_logits=False
        )
        return batch._cache

    held = ask(1, 10)
    assert held.block_tokens * held.num_blocks == session.info.limits.max_seq_len == 48
    assert ask(1, 12) is held and ask(1, 8) is held
    grown = ask(3, 10)
    assert grown is not held and ask(1, 12) is grown and ask(2, 10) is grown


@pytest.mark.parametrize(
    "held, needed, shape",
    [
        ((0, 0), (4, 128), (4, 128)),
        ((1, 256), (4, 128), (4, 256)),
        ((64, 256), (1, 1152), (1, 1152)),
        ((9, 16), (20, 16), (20, 16)),
    ],
)
def test_a_cache_grows_to_serve_what_came_before_if_that_is_cheap(
    session, monkeypatch, held, needed, shape
):
    monkeypatch.setattr(session, "_cache_shape", held)
    assert session._grow(*needed) == shape


def test_graphs_go_before_what_they_use_stops() -> None:
    """At exit, even of a program that still holds its session."""
    program = """if True:
        import atexit
        from engine.graph import GraphPool
        class Graph:
            def __del__(self):
                print("graph")
        atexit.register(print, "communicators")
        pool = GraphPool(None)
        pool._captured["plan"] = None, Graph()
    """
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert output.split() == ["graph", "communicators"]
