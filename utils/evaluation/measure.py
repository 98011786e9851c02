"""Answering a task's cases batch by batch, with the time that takes; the same for both sides."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from utils.evaluation.task import Ids, Side, Speed, Task

# Enough new tokens to reach the code and the buffers of every later step.
WARM_UP_TOKENS = 4
# Batches whose first token is timed by itself.
FIRST_TOKEN_BATCHES = 3

# Told the answers of each batch, outside the measured time.
Watch = Callable[[list[Ids]], None]


class Measured(NamedTuple):
    answers: tuple[Ids, ...]
    speed: Speed


def measure(
    side: Side, task: Task, watch: Watch, clock: Callable[[], float] = time.perf_counter
) -> Measured:
    """All answers of `side`, timed after a warm-up that is not."""
    batches = split_batches([case.prompt for case in task.cases], task.batch_size)
    new_tokens = task.rules.max_new_tokens
    side.generate(batches[0], min(WARM_UP_TOKENS, new_tokens))
    first = []
    for batch in batches[:FIRST_TOKEN_BATCHES]:
        start = clock()
        side.generate(batch, 1)
        first.append(clock() - start)
    answers: list[Ids] = []
    seconds = 0.0
    for batch in batches:
        start = clock()
        found = side.generate(batch, new_tokens)
        seconds += clock() - start
        answers += found
        watch(found)
    generated = sum(map(len, answers))
    return Measured(tuple(answers), Speed(generated, seconds, statistics.median(first)))


def split_batches(prompts: Sequence[Ids], size: int) -> list[list[Ids]]:
    return [list(prompts[start : start + size]) for start in range(0, len(prompts), size)]
