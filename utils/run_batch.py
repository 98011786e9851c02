"""Running given prompts: whole, streamed or timed; then lines on the terminal and files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from utils.output import Ids, format_result, write_files
from utils.request import Request
from utils.run_plan import RunPlan
from utils.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.comm import World
    from engine.sampling import SamplingParams
    from engine.session import Result, Session


@dataclass(frozen=True)
class Profile:
    """Seconds of one measured run of all prompts, after a run to warm up."""

    prompts: int
    new_tokens: int
    latency: float
    first_token: float  # of the first batch alone, its prompts' computation included

    def __str__(self) -> str:
        return (
            f"Latency: {self.latency * 1e3:.1f} ms for {self.new_tokens} new tokens of "
            f"{self.prompts} prompts\n"
            f"Throughput: {self.new_tokens / self.latency:.1f} tokens/s\n"
            f"Time to first token: {self.first_token * 1e3:.1f} ms"
        )


def run_batch(
    session: Session,
    world: World,
    plan: RunPlan,
    request: Request,
    params: Sequence[SamplingParams],
    tokenizer: Tokenizer | None,
) -> None:
    """Run the request and report it as `plan` says; only rank 0 prints and writes."""
    prompts = request.prompts
    show = _Printer(prompts, tokenizer) if world.rank == 0 and not plan.files.has_ids else _skip
    results: list[Result] = []
    profile = None
    if plan.streaming:
        for results in session.stream(prompts, params, plan.streaming_interval):
            show(results)
    elif plan.profiling:
        results, profile = measure(session, prompts, params)
    else:
        wants_logits = plan.files.output_logits_npy is not None
        results = session.generate(
            prompts, params, context_logits=wants_logits, generation_logits=wants_logits
        )
    if world.rank != 0:
        return
    show(results)
    if profile is not None:
        print(profile)
    end_id = next(iter(params[0].end_ids), request.pad_id)
    write_files(plan.files, prompts, results, end_id=end_id)


class _Printer:
    """Prints results; of a stream, those that have grown since they were last printed."""

    def __init__(self, prompts: Sequence[Ids], tokenizer: Tokenizer | None):
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._shown: dict[int, list[Ids]] = {}

    def __call__(self, results: Sequence[Result]) -> None:
        for result in results:
            index, beams = result.prompt_index, [beam.tokens for beam in result.beams]
            if self._shown.get(index) != beams:
                lines = format_result(self._prompts[index], result, self._tokenizer)
                print("\n".join(lines), flush=True)
            self._shown[index] = beams


def _skip(results: Sequence[Result]) -> None:
    """Other ranks and runs that write ids print no text."""


def measure(
    session: Session,
    prompts: Sequence[Ids],
    params: Sequence[SamplingParams],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Result], Profile]:
    """Warm up with a whole run, time another, then time one token of the first batch."""
    session.generate(prompts, params)
    start = clock()
    results = session.generate(prompts, params)
    latency = clock() - start
    first = min(len(prompts), session.info.limits.max_batch_size)
    short = [replace(p, max_new_tokens=1, min_length=0) for p in params[:first]]
    start = clock()
    session.generate(prompts[:first], short)
    first_token = clock() - start
    new_tokens = sum(len(beam.tokens) for result in results for beam in result.beams)
    return results, Profile(len(prompts), new_tokens, latency, first_token)
