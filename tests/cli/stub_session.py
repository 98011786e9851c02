"""A session whose answers are known: the first tokens of the prompt."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from engine.decoding import Beam
from engine.errors import RequestError
from engine.sampling import FinishReason, SamplingParams
from engine.session import Result


class StubSession:
    """Answers a prompt with its own first tokens; beam b leaves out the first b of them."""

    def __init__(self, batch: int = 2):
        self.calls: list[tuple] = []
        self.info = SimpleNamespace(
            limits=SimpleNamespace(max_batch_size=batch, max_input_len=64),
            generation={"eos_token_id": [2, 9]},
            notes=(),
        )

    def generate(self, prompts, params, *, context_logits=False, generation_logits=False):
        self.calls.append((prompts, params))
        for prompt in prompts:
            if len(prompt) > self.info.limits.max_input_len:
                raise RequestError(f"prompt 0 has {len(prompt)} tokens, too many")
        logits = torch.ones(2, 4) if context_logits and generation_logits else None
        return [
            Result(i, _beams(prompt, p, p.max_new_tokens), logits, logits)
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]

    def stream(self, prompts, params, interval):
        whole = self.generate(prompts, params)
        for start in range(0, len(prompts), self.info.limits.max_batch_size):
            stop = min(len(prompts), start + self.info.limits.max_batch_size)
            for tokens in range(interval, params[0].max_new_tokens, interval):
                yield whole[:start] + [
                    Result(i, _beams(prompts[i], params[i], tokens)) for i in range(start, stop)
                ]
            yield whole[:stop]


def _beams(prompt, p: SamplingParams, tokens: int) -> tuple[Beam, ...]:
    scores = (-0.5,) * min(tokens, len(prompt)) if p.log_probs else None
    total = None if scores is None else sum(scores)
    return tuple(
        Beam(tuple(prompt[beam : beam + tokens]), FinishReason.LENGTH, scores, total)
        for beam in range(p.num_beams)
    )
