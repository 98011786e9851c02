"""A session over TensorRT-LLM's runners: our requests in their words, their answers as ours.

Imports nothing of the library: the runner is handed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.comm import World
from engine.decoding import Beam
from engine.errors import RequestError
from engine.record import EngineRecord
from engine.sampling import FinishReason, SamplingParams
from engine.session import Result, check_requests

# What stands for no end id.
NO_TOKEN = -1
LEADER = 0


@dataclass(frozen=True)
class Runner:
    """The library's runner, whether it is the C++ one, and the names of its sampling settings."""

    object: Any
    is_cpp: bool
    settings: frozenset[str]


class Setting(NamedTuple):
    """A field of SamplingParams, its value without effect, and its names in the library: what
    `generate` takes, and what its settings call it."""

    field: str
    neutral: float
    names: tuple[tuple[str, str], ...]


def _same(name: str) -> tuple[tuple[str, str], ...]:
    return ((name, name),)


SETTINGS = (
    Setting("num_beams", 1, (("num_beams", "beam_width"), ("num_beams", "num_beams"))),
    Setting("min_length", 1, (("min_tokens", "min_tokens"), ("min_length", "min_length"))),
    Setting("min_p", 0.0, _same("min_p")),
    Setting("repetition_penalty", 1.0, _same("repetition_penalty")),
    Setting("presence_penalty", 0.0, _same("presence_penalty")),
    Setting("frequency_penalty", 0.0, _same("frequency_penalty")),
    Setting("length_penalty", 1.0, _same("length_penalty")),
    Setting("early_stopping", 1, _same("early_stopping")),
    Setting("no_repeat_ngram_size", 0, _same("no_repeat_ngram_size")),
    Setting("random_seed", 0, (("random_seed", "seed"), ("random_seed", "random_seed"))),
)


class TrtllmSession:
    """`engine.session.Session` for TensorRT engines: the same methods, arguments and results.

    Requests with the same parameters are one batch. The first rank has the answers and tells the
    others.
    """

    def __init__(self, record: EngineRecord, runner: Runner, world: World):
        self.info = record
        self._runner, self._world = runner, world

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        context_logits: bool = False,
        generation_logits: bool = False,
    ) -> list[Result]:
        self._check(prompts, params, context_logits or generation_logits)
        # Early versions know no such option, so it is given only where it is wanted.
        options = {"output_generation_logits": True} if generation_logits else {}
        results: list[Result] = []
        for start, stop in self._batches(params):
            found = self._call(prompts[start:stop], params[start:stop], **options)
            batch = None
            if self._world.rank == LEADER:
                asked = zip(prompts[start:stop], params[start:stop], strict=True)
                batch = [
                    _read(found, row, start + row, prompt, one, context_logits, generation_logits)
                    for row, (prompt, one) in enumerate(asked)
                ]
            results += self._world.bcast(batch, root=LEADER)
        return results

    def stream(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], interval: int
    ) -> Iterator[list[Result]]:
        self._check(prompts, params, False)
        if any(one.num_beams > 1 for one in params):
            raise RequestError(
                "--streaming cannot be combined with --num_beams on a TensorRT engine, whose "
                "beams come at the end; leave one of them out"
            )
        done: list[Result] = []
        for start, stop in self._batches(params):
            batch: list[Result] = []
            waiting = None
            for step, batch in enumerate(self._steps(prompts, params, start, stop), start=1):
                # Only the next step shows that this was not the last one, which is told below.
                if waiting is not None:
                    yield waiting
                waiting = done + batch if step % interval == 0 else None
            done += [replace(result, beams=_finished(result.beams)) for result in batch]
            yield list(done)

    def score(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        params = [SamplingParams(max_new_tokens=1)] * len(prompts)
        results = self.generate(prompts, params, context_logits=True)
        return [result.context_logits for result in results]

    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        start: int,
        stop: int,
    ) -> Iterator[list[Result]]:
        """The results of one batch as they grow, on every rank."""
        asked = list(zip(prompts[start:stop], params[start:stop], strict=True))
        found = iter(self._call(prompts[start:stop], params[start:stop], streaming=True))
        while True:
            batch = None
            if self._world.rank == LEADER and (step := next(found, None)) is not None:
                batch = [
                    _read(step, row, start + row, prompt, one, False, False, is_final=False)
                    for row, (prompt, one) in enumerate(asked)
                ]
            batch = self._world.bcast(batch, root=LEADER)
            if batch is None:
                return
            yield batch

    def _batches(self, params: Sequence[SamplingParams]) -> Iterator[tuple[int, int]]:
        start = 0
        while start < len(params):
            stop, limit = start + 1, min(len(params), start + self.info.limits.max_batch_size)
            while stop < limit and _shared(params[stop]) == _shared(params[start]):
                stop += 1
            yield start, stop
            start = stop

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        wants_logits: bool,
    ) -> None:
        check_requests(self.info, prompts, params, wants_logits=wants_logits)
        for one in params:
            self._translate(one)

    def _call(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], **options: Any
    ) -> Any:
        inputs = [torch.tensor(prompt, dtype=torch.int32) for prompt in prompts]
        settings = self._translate(params[0])
        words = {
            "stop_words_list": [(*p.stop_words, *_more_ends(p)) for p in params],
            "bad_words_list": [p.bad_words for p in params],
        }
        for name, lists in words.items():
            if any(lists):
                settings[name] = self._pack_words(lists)
        return self._runner.object.generate(
            inputs, output_sequence_lengths=True, return_dict=True, **settings, **options
        )

    def _pack_words(self, lists: Sequence[Sequence[Sequence[int]]]) -> Any:
        """Words per prompt: lists for the C++ runner, int32 [batch, 2, length] for the Python one,
        whose rows are all tokens and the end of each word, filled up with 0 and -1."""
        as_lists = [[list(word) for word in words] for words in lists]
        if self._runner.is_cpp:
            return as_lists
        length = max(sum(map(len, words)) for words in as_lists)
        packed = torch.zeros(len(lists), 2, length, dtype=torch.int32)
        packed[:, 1] = NO_TOKEN
        for row, words in zip(packed, as_lists, strict=True):
            end = 0
            for index, word in enumerate(words):
                row[0, end : end + len(word)] = torch.tensor(word, dtype=torch.int32)
                end += len(word)
                row[1, index] = end
        return packed

    def _translate(self, params: SamplingParams) -> dict[str, Any]:
        """Keyword arguments of the library's `generate`; RequestError for what it cannot do."""
        greedy = params.is_greedy
        values: dict[str, Any] = {
            "max_new_tokens": params.max_new_tokens,
            "end_id": params.end_ids[0] if params.end_ids else NO_TOKEN,
            "pad_id": params.pad_id,
            "top_k": 1 if greedy else params.top_k,
            # Their 0 means unset, which with a top_k of 0 is greedy.
            "top_p": 0.0 if greedy else params.top_p or 1.0,
            "temperature": 1.0 if greedy else params.temperature,
        }
        if params.log_probs:
            values |= {"output_log_probs": True, "output_cum_log_probs": True}
        for setting in SETTINGS:
            value = getattr(params, setting.field)
            if value == setting.neutral:
                continue
            name = next((n for n, own in setting.names if own in self._runner.settings), None)
            if name is None:
                raise RequestError(
                    f"--{setting.field} {value}: this version of TensorRT-LLM has no such "
                    "setting; leave it out, or run the model on the default backend"
                )
            values[name] = value
        return values


def _shared(params: SamplingParams) -> SamplingParams:
    """What all requests of one call have in common."""
    return replace(params, stop_words=(), bad_words=())


def _more_ends(params: SamplingParams) -> tuple[tuple[int, ...], ...]:
    """The library has one end id; the others are stop words of one token."""
    return tuple((token,) for token in params.end_ids[1:])


def _read(
    found: Mapping[str, Any],
    row: int,
    index: int,
    prompt: Sequence[int],
    params: SamplingParams,
    context_logits: bool,
    generation_logits: bool,
    *,
    is_final: bool = True,
) -> Result:
    """The answer to one prompt; `found` is the library's dictionary for a batch."""
    beams = []
    for beam in range(params.num_beams):
        stop = int(found["sequence_lengths"][row][beam])
        tokens = found["output_ids"][row][beam][len(prompt) : stop].tolist()
        log_probs = None
        if params.log_probs:
            log_probs = found["log_probs"][row][beam][: len(tokens)].tolist()
        beams.append(_read_beam(tokens, params, log_probs, is_final))
    context = generation = None
    if context_logits:
        context = found["context_logits"][row][: len(prompt)].float().cpu()
    if generation_logits:
        length = len(beams[0].tokens) or 1
        generation = found["generation_logits"][row][0][:length].float().cpu()
    return Result(index, tuple(beams), context, generation)


def _read_beam(
    tokens: list[int], params: SamplingParams, log_probs: list[float] | None, is_final: bool
) -> Beam:
    """A continuation with its end id left out, as the torch backend's are."""
    total = None if log_probs is None else sum(log_probs)
    reason = FinishReason.NOT_FINISHED
    if tokens and tokens[-1] in params.end_ids:
        tokens, reason = tokens[:-1], FinishReason.END_ID
    elif any(tuple(tokens[-len(word) :]) == tuple(word) for word in params.stop_words):
        reason = FinishReason.STOP_WORDS
    elif len(tokens) >= params.max_new_tokens:
        reason = FinishReason.LENGTH
    elif is_final:
        # The C++ runner may leave the end id out itself.
        reason = FinishReason.END_ID
    kept = None if log_probs is None else tuple(log_probs[: len(tokens)])
    return Beam(tuple(tokens), reason, kept, total)


def _finished(beams: Sequence[Beam]) -> tuple[Beam, ...]:
    """The last step of a stream: what has no other reason met its end id."""
    return tuple(
        replace(beam, reason=FinishReason.END_ID)
        if beam.reason is FinishReason.NOT_FINISHED
        else beam
        for beam in beams
    )
