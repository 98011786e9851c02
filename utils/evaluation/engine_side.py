"""The engine's side: a session that answers, scores and tells the logits of a next token."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from engine.sampling import SamplingParams
from engine.session import Session
from utils.evaluation.perplexity import engine_likelihood
from utils.evaluation.task import Ids, Likelihood, Rules


class EngineSide:
    """A `Side` of an engine; every rank of its job makes one and calls it alike."""

    def __init__(self, session: Session, rules: Rules):
        self._session = session
        self._params = make_params(rules)

    def generate(self, prompts: list[Ids], max_new_tokens: int) -> list[Ids]:
        params = limit_params(self._params, max_new_tokens)
        results = self._session.generate(prompts, [params] * len(prompts))
        return [result.beams[0].tokens for result in results]

    def next_logits(self, context: Ids) -> Tensor | None:
        if len(context) > self._session.info.limits.max_input_len:
            return None
        params = SamplingParams(max_new_tokens=1, end_ids=())
        [result] = self._session.generate([context], [params], generation_logits=True)
        return result.generation_logits[0]

    def likelihood(self, windows: tuple[Ids, ...]) -> Likelihood:
        return engine_likelihood(self._session, windows)


def make_params(rules: Rules) -> SamplingParams:
    """RequestError for values that decoding does not know."""
    return SamplingParams(
        max_new_tokens=rules.max_new_tokens,
        end_ids=rules.end_ids,
        pad_id=rules.pad_id,
        stop_words=rules.stop_words,
        bad_words=rules.bad_words,
        **vars(rules.decoding),
    )


def limit_params(params: SamplingParams, max_new_tokens: int) -> SamplingParams:
    least = min(params.min_length, max_new_tokens)
    return replace(params, max_new_tokens=max_new_tokens, min_length=least)
