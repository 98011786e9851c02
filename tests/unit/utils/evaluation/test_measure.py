"""What is timed and what is not, with a clock that counts generated tokens; peak memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from utils.evaluation.measure import FIRST_TOKEN_BATCHES, WARM_UP_TOKENS, measure
from utils.evaluation.memory import PeakMemory
from utils.evaluation.task import Case, Rules, Task
from utils.generation import Decoding


class CostlySide:
    """Repeats a prompt's first token; every call costs a second per prompt and new token."""

    def __init__(self):
        self.now = 0.0
        self.calls: list[tuple[int, int]] = []

    def generate(self, prompts, max_new_tokens):
        self.calls.append((len(prompts), max_new_tokens))
        self.now += len(prompts) * max_new_tokens
        return [(prompt[0],) * (max_new_tokens - 1) for prompt in prompts]


def make_task(cases: int, batch_size: int, max_new_tokens: int) -> Task:
    rules = Rules(Decoding(), max_new_tokens, end_ids=(2,), pad_id=0)
    return Task(tuple(Case(str(i), (i, i)) for i in range(cases)), rules, batch_size)


def test_warm_up_and_watching_cost_no_time():
    side, seen = CostlySide(), []

    def watch(answers):
        seen.append(answers)
        side.now += 1000

    answers, speed = measure(side, make_task(11, 2, 10), watch, clock=lambda: side.now)
    assert answers == tuple((i,) * 9 for i in range(11))
    assert [len(batch) for batch in seen] == [2, 2, 2, 2, 2, 1]
    assert side.calls[0] == (2, WARM_UP_TOKENS)
    assert side.calls[1 : 1 + FIRST_TOKEN_BATCHES] == [(2, 1)] * FIRST_TOKEN_BATCHES
    assert speed == (99, 110, 2)
    assert speed.tokens_per_second == pytest.approx(0.9)


def test_warm_up_is_no_longer_than_the_task():
    side = CostlySide()
    measure(side, make_task(1, 8, 1), lambda answers: None, clock=lambda: side.now)
    assert side.calls == [(1, 1)] * 3


STRETCH = """
import torch
from utils.evaluation.memory import PeakMemory
MIB = 2**20
held = torch.ones(200 * MIB, dtype=torch.uint8)
torch.ones(300 * MIB, dtype=torch.uint8)
with PeakMemory(on_gpu=False) as memory:
    torch.ones(100 * MIB, dtype=torch.uint8)
print(memory.bytes // MIB)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's peak")
def test_peak_memory_is_that_of_the_stretch():
    """Neither what was there before nor what an earlier stretch needed. A process of its own has
    nothing else that the system might take back meanwhile."""
    command = [sys.executable, "-c", STRETCH]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert 90 < int(finished.stdout) < 150, finished.stderr


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr("utils.evaluation.memory._RESET", tmp_path / "none" / "clear_refs")
    with PeakMemory(on_gpu=False) as memory:
        pass
    assert memory.bytes is None
