"""Ratios of pairs, and the protocol between the comparison and a side's process."""

from __future__ import annotations

import io
from importlib.util import find_spec

import pytest

from benchmarks.peering.process import serve
from benchmarks.peering.task import Task
from benchmarks.peers import Pair, compare, compare_all, peers_table
from utils.benchmarking.dummy import DummyEngine
from utils.benchmarking.timing import Latency
from utils.benchmarking.workload import Workload

WORK = Workload(batch=2, input_len=8, output_len=5)


def test_ratios_are_medians_of_neighbours():
    """The machine is half as fast in the second pair, which changes no ratio."""
    pairs = [
        Pair(ours=Latency(1.0, 5.0), theirs=Latency(3.0, 11.0)),
        Pair(ours=Latency(2.0, 10.0), theirs=Latency(6.0, 22.0)),
        Pair(ours=Latency(1.0, 5.0), theirs=Latency(3.0, 11.0)),
    ]
    found = compare(pairs, WORK)
    # Ours decodes 4 steps in 4 s, theirs in 8 s.
    assert found["decode_ratio"] == pytest.approx(2.0)
    assert found["prefill_ratio"] == pytest.approx(3.0)
    assert found["whole_ratio"] == pytest.approx(2.2)
    assert found["decode_tokens_per_s"] == pytest.approx(2 * 4 / 8)
    assert found["pairs"] == 3


class Side:
    setup = "a side"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def seconds(self, new_tokens: int) -> float:
        self.calls.append(new_tokens)
        return 100.0 if self.calls.count(new_tokens) == 1 else float(new_tokens)


def test_a_side_warms_up_once_for_each_length():
    side, answers = Side(), []
    serve(side, io.StringIO("5\n1\n5\n"), answers.append)
    assert answers == [{"setup": "a side"}, *({"seconds": s} for s in (5.0, 1.0, 5.0))]
    assert side.calls == [5, 5, 1, 1, 5]


def test_peers_that_are_not_installed_are_named(tmp_path):
    """vLLM is not in the requirements; its process says so."""
    if find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    task = Task(DummyEngine("tiny"), WORK, "cpu", "", str(tmp_path))
    pairs, peers = compare_all(None, ["vllm"], task, rounds=1)
    assert pairs == []
    assert peers == {"vllm": {"absent": "vllm is not installed"}}
    assert "| vllm | absent: vllm is not installed |" in peers_table(peers)


def test_tasks_travel_as_text():
    task = Task(
        DummyEngine("yi-6b", 8, "int8", quantize_lm_head=True), WORK, "cuda", "/engine", "/folder"
    )
    assert Task.from_json(task.to_json()) == task
