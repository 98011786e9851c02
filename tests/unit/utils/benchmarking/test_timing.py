"""What is timed: medians of whole generations, without those that warm up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from utils.benchmarking.timing import Latency, time_latency, time_throughput
from utils.benchmarking.workload import Workload, random_prompts


class Session:
    """Takes a second per new token, and 100 more while it is cold, for each length."""

    info = SimpleNamespace(config=SimpleNamespace(vocab_size=50))

    def __init__(self) -> None:
        self.now = 0.0
        self.batches: list[tuple[int, int]] = []

    def generate(self, prompts, params):
        new_tokens = params[0].max_new_tokens
        is_cold = new_tokens not in {length for _, length in self.batches}
        self.now += new_tokens + 100 * is_cold
        self.batches.append((len(prompts), new_tokens))
        assert {one.end_ids for one in params} == {()}
        beam = SimpleNamespace(tokens=(0,) * new_tokens)
        return [SimpleNamespace(beams=(beam,)) for _ in prompts]

    def clock(self) -> float:
        return self.now


def test_latency_leaves_the_first_runs_out():
    session = Session()
    found = time_latency(session, Workload(3, 4, 7), repeats=2, clock=session.clock)
    assert found == Latency(first=1.0, whole=7.0)
    assert session.batches == [(3, 7), (3, 1), *[(3, 1), (3, 7)] * 2]


def test_one_new_token_is_all_there_is():
    session = Session()
    found = time_latency(session, Workload(3, 4, 1), repeats=1, clock=session.clock)
    assert found.first == found.whole == 1.0


def test_throughput_warms_up_the_smaller_last_batch_too():
    session = Session()
    seconds = time_throughput(
        session, Workload(4, 4, 5), requests=10, repeats=1, clock=session.clock
    )
    assert seconds == 5.0
    assert [rows for rows, _ in session.batches] == [4, 2, 10]


def test_prompts_are_random_and_always_the_same():
    prompts = random_prompts(3, 40, vocab_size=50)
    assert prompts == random_prompts(3, 40, vocab_size=50)
    assert prompts[0] != prompts[1]
    assert {len(prompt) for prompt in prompts} == {40}
    assert {token for prompt in prompts for token in prompt} <= set(range(50))


def test_a_session_that_stops_early_is_no_measurement():
    session = Session()
    short = SimpleNamespace(beams=(SimpleNamespace(tokens=()),))
    session.generate = lambda prompts, params: [short]
    with pytest.raises(AssertionError):
        time_latency(session, Workload(1, 4, 7), repeats=1)
