"""How long a session takes for a workload. Every rank calls these alike.

Prompts are random, decoding is greedy, and no token ends an output. The clock is read when a
session has returned the tokens, which is after the device has made them, and nowhere between: on a
GPU the host is steps ahead of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.sampling import SamplingParams
from engine.session import Session
from utils.benchmarking.workload import Workload, random_prompts

Clock = Callable[[], float]


@dataclass(frozen=True)
class Latency:
    """Seconds, medians: until the batch has its first tokens, and until it has all of them."""

    first: float
    whole: float


def time_latency(
    session: Session, work: Workload, *, repeats: int, clock: Clock = time.perf_counter
) -> Latency:
    """Of one static batch. Both lengths run once before: buffers, graphs and kernels are made."""
    prompts = random_prompts(work.batch, work.input_len, session.info.config.vocab_size)

    def generate(new_tokens: int) -> float:
        start = clock()
        generate_all(session, prompts, new_tokens)
        return clock() - start

    # The longer one first, so that the cache has its final size when graphs are made.
    for new_tokens in (work.output_len, 1):
        generate(new_tokens)
    pairs = [(generate(1), generate(work.output_len)) for _ in range(repeats)]
    first, whole = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Latency(first, first if work.output_len == 1 else whole)


def time_throughput(
    session: Session,
    work: Workload,
    *,
    requests: int,
    repeats: int,
    clock: Clock = time.perf_counter,
) -> float:
    """Median seconds of `requests` requests in batches of `work.batch` and a smaller last."""
    prompts = random_prompts(requests, work.input_len, session.info.config.vocab_size)
    last = requests % work.batch
    for batch in (prompts[: work.batch], prompts[:last]):
        if batch:
            generate_all(session, batch, work.output_len)
    seconds = []
    for _ in range(repeats):
        start = clock()
        generate_all(session, prompts, work.output_len)
        seconds.append(clock() - start)
    return statistics.median(seconds)


def generate_all(session: Session, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Exactly `new_tokens` for each prompt."""
    params = SamplingParams(max_new_tokens=new_tokens, end_ids=())
    results = session.generate(prompts, [params] * len(prompts))
    assert all(len(result.beams[0].tokens) == new_tokens for result in results)
