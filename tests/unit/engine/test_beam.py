"""Beam search against transformers' generate on a tiny random Llama."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from engine.beam import BeamSearch
from engine.errors import RequestError
from engine.sampling import FinishReason, SamplingParams

VOCAB = 97
NEW = 8
FEW_ENDS = (7,)
MANY_ENDS = (7, 11, *range(50, 60))
EARLY_STOPPING = {1: True, 0: False, 2: "never"}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        # Random logits are nearly flat; larger ones make hypotheses differ in score.
        model.lm_head.weight.mul_(6)
    return model


def make_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count, length), generator=generator).tolist()


PROMPTS = make_prompts(6, 5, seed=1) + make_prompts(6, 9, seed=2)


def make_params(**fields) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": NEW, "end_ids": MANY_ENDS, "num_beams": 3, **fields})


@torch.no_grad()
def next_logits(model: LlamaForCausalLM, rows: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    last = torch.tensor([len(row) - 1 for row in rows])
    return model(ids).logits[torch.arange(len(rows)), last]


def search(model, params: list[SamplingParams], prompts: list[list[int]], extra_steps: int = 0):
    """Results of BeamSearch driven by whole forward passes over the rows that it names."""
    beams = params[0].num_beams
    state = BeamSearch(params, prompts, VOCAB, "cpu")
    rows = [prompt for prompt in prompts for _ in range(beams)]
    for _ in range(max(p.max_new_tokens for p in params)):
        step = state.step(next_logits(model, rows))
        chosen = zip(step.parents_R.tolist(), step.tokens_R.tolist(), strict=True)
        rows = [rows[parent] + [token] for parent, token in chosen]
        if step.finished_B.all():
            break
    assert step.finished_B.all()
    results = state.results()
    for _ in range(extra_steps):
        step = state.step(next_logits(model, rows))
        assert step.tokens_R.tolist() == [p.pad_id for p in params for _ in range(beams)]
        assert step.parents_R.tolist() == list(range(len(rows)))
        assert step.finished_B.all()
    assert state.results() == results
    return results


class OutputCounts(LogitsProcessor):
    """Presence and frequency penalty, counted one token at a time."""

    def __init__(self, presence: float, frequency: float, prompt_length: int):
        self.presence, self.frequency, self.start = presence, frequency, prompt_length

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, ids in enumerate(input_ids.tolist()):
            for token in set(ids[self.start :]):
                count = ids[self.start :].count(token)
                scores[row, token] -= self.presence + self.frequency * count
        return scores


class StopSequences(StoppingCriteria):
    def __init__(self, words, prompt_length: int):
        self.words, self.start = [list(word) for word in words], prompt_length

    def __call__(self, input_ids, scores, **kwargs):
        new = [ids[self.start :] for ids in input_ids.tolist()]
        return torch.tensor([any(ids[-len(w) :] == w for w in self.words) for ids in new])


@torch.no_grad()
def generate(model, p: SamplingParams, prompts: list[list[int]]) -> list[list[tuple]]:
    """transformers' hypotheses as (tokens, score), per prompt; prompts of one length."""
    ids = torch.tensor(prompts)
    start = ids.shape[1]
    options = {}
    if p.bad_words:
        options["bad_words_ids"] = [list(word) for word in p.bad_words]
    if p.min_length > 1:
        options["min_new_tokens"] = p.min_length
    if p.no_repeat_ngram_size:
        options["no_repeat_ngram_size"] = p.no_repeat_ngram_size
    if p.presence_penalty or p.frequency_penalty:
        counts = OutputCounts(p.presence_penalty, p.frequency_penalty, start)
        options["logits_processor"] = LogitsProcessorList([counts])
    if p.stop_words:
        options["stopping_criteria"] = StoppingCriteriaList([StopSequences(p.stop_words, start)])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=p.num_beams,
        num_return_sequences=p.num_beams,
        max_new_tokens=p.max_new_tokens,
        eos_token_id=list(p.end_ids) or None,
        pad_token_id=0,
        do_sample=False,
        length_penalty=p.length_penalty,
        early_stopping=EARLY_STOPPING[p.early_stopping],
        repetition_penalty=p.repetition_penalty,
        use_cache=False,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    lengths = (found.beam_indices >= 0).sum(1).tolist()
    rows = zip(found.sequences.tolist(), lengths, strict=True)
    tokens = [row[start : start + length] for row, length in rows]
    flat = list(zip(tokens, found.sequences_scores.tolist(), strict=True))
    return [flat[i : i + p.num_beams] for i in range(0, len(flat), p.num_beams)]


def assert_same(actual, expected) -> None:
    for hypotheses, truth in zip(actual, expected, strict=True):
        assert [h.tokens for h in hypotheses] == [tokens for tokens, _ in truth]
        scores = [score for _, score in truth]
        assert [h.score for h in hypotheses] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("end_ids", [FEW_ENDS, MANY_ENDS], ids=["one_end", "many_ends"])
@pytest.mark.parametrize("early_stopping", [0, 1, 2])
@pytest.mark.parametrize("length_penalty", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_beams", [2, 3, 4])
def test_hypotheses_equal_transformers(model, num_beams, length_penalty, early_stopping, end_ids):
    p = make_params(
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        end_ids=end_ids,
    )
    # One batch of both lengths here, one batch per length there.
    actual = search(model, [p] * len(PROMPTS), PROMPTS)
    assert_same(actual, generate(model, p, PROMPTS[:6]) + generate(model, p, PROMPTS[6:]))
    if end_ids == MANY_ENDS:
        reasons = {h.reason for hypotheses in actual for h in hypotheses}
        assert FinishReason.END_ID in reasons
    for h in (h for hypotheses in actual for h in hypotheses):
        assert h.score == pytest.approx(h.log_prob / len(h.tokens) ** length_penalty, abs=1e-4)


RULES = {
    "repetition": {"repetition_penalty": 1.5},
    "ngram": {"no_repeat_ngram_size": 2},
    "ngram_1": {"no_repeat_ngram_size": 1},
    "bad_words": {"bad_words": ((40,), (41, 42), *((token,) for token in range(60, 80)))},
    "min_length": {"min_length": 4},
    "presence_frequency": {"presence_penalty": 0.9, "frequency_penalty": 0.7},
    "negative_length_penalty": {"length_penalty": -1.0, "early_stopping": 2},
    "no_length_penalty": {"length_penalty": 0.0, "early_stopping": 0},
    "no_end": {"end_ids": ()},
    "one_token": {"max_new_tokens": 1},
    "stop_words": {"stop_words": (*((t,) for t in range(20, 30)), *((t, t) for t in range(97)))},
    "all": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words": ((40,),),
        "min_length": 3,
        "presence_penalty": 0.3,
        "length_penalty": 1.5,
        "early_stopping": 0,
    },
}


@pytest.mark.parametrize("name", RULES)
def test_rules_act_as_in_transformers(model, name):
    p = make_params(**RULES[name])
    prompts = PROMPTS[:6]
    expected = generate(model, p, prompts)
    assert_same(search(model, [p] * 6, prompts), expected)
    if name != "one_token":
        assert expected != generate(model, make_params(), prompts)


def test_requests_of_a_batch_keep_their_own_parameters(model):
    params = [
        make_params(**{**fields, "max_new_tokens": 3 + i % 6}, pad_id=i)
        for i, (name, fields) in enumerate(RULES.items())
        if name != "one_token"
    ]
    params = [dataclasses.replace(p, min_length=min(p.min_length, 3)) for p in params]
    prompts = PROMPTS[: len(params)]
    actual = search(model, params, prompts, extra_steps=2)
    expected = [generate(model, p, [prompt])[0] for p, prompt in zip(params, prompts, strict=True)]
    assert_same(actual, expected)


def test_stop_words_do_not_begin_in_the_prompt(model):
    prompt = PROMPTS[0]
    first = search(model, [make_params(end_ids=())], [prompt])[0][0].tokens[0]
    words = ((prompt[-1], first),)
    best = search(model, [make_params(end_ids=(), stop_words=words)], [prompt])[0][0]
    assert best.tokens[0] == first and best.reason == FinishReason.LENGTH


@pytest.mark.parametrize("max_new_tokens", [126, 127, 128])
def test_full_requests_step_on_without_effect(max_new_tokens):
    params = [make_params(max_new_tokens=n, end_ids=(), num_beams=2) for n in (1, max_new_tokens)]
    state = BeamSearch(params, [[5] * 128, [5]], VOCAB, "cpu")
    logits_RV = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    for step in range(1, max_new_tokens + 3):
        finished_B = state.step(logits_RV).finished_B
        assert finished_B.tolist() == [True, step >= max_new_tokens]
    assert [len(h.tokens) for r in state.results() for h in r] == [1, 1] + [max_new_tokens] * 2


def test_what_cannot_end_is_reported_as_unfinished():
    # Every token is banned from the first step on.
    p = make_params(bad_words=tuple((token,) for token in range(5)), end_ids=(2,))
    state = BeamSearch([p], [[1]], 5, "cpu")
    for _ in range(NEW):
        state.step(torch.zeros(3, 5))
    for hypothesis in state.results()[0]:
        assert hypothesis == ([], -math.inf, -math.inf, FinishReason.NOT_FINISHED)


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(RequestError, match="request 1 holds token id 97"):
        BeamSearch([make_params()] * 2, [[1], [97]], VOCAB, "cpu")


def make_mixed_batch() -> tuple[list[SamplingParams], list[list[int]]]:
    params = [make_params(**fields) for fields in RULES.values()]
    return params, [PROMPTS[i] for i in range(len(params))]


def random_logits(params: list[SamplingParams], seed: int) -> torch.Tensor:
    """Logits [steps, R, V] with the beams of a request alike at the first step."""
    generator = torch.Generator().manual_seed(seed)
    logits_SRV = 3 * torch.randn(NEW, 3 * len(params), VOCAB, generator=generator)
    logits_SRV[0] = logits_SRV[0, ::3].repeat_interleave(3, 0)
    return logits_SRV


def run(params, prompts, logits_SRV):
    state = BeamSearch(params, prompts, VOCAB, "cpu")
    for logits_RV in logits_SRV:
        state.step(logits_RV)
    return state.results()


def test_a_step_reads_nothing_back_to_the_host():
    # Meta tensors have no values: whatever needs one, or a shape that depends on one, fails.
    params, prompts = make_mixed_batch()
    state = BeamSearch(params, prompts, VOCAB, "meta")
    step = state.step(torch.empty(3 * len(params), VOCAB, device="meta"))
    assert step.tokens_R.shape == step.parents_R.shape == (3 * len(params),)


def test_a_used_search_adopts_another_batch_of_its_plan_in_place():
    params, prompts = make_mixed_batch()
    later = [dataclasses.replace(p, length_penalty=p.length_penalty + 1) for p in params]
    logits_SRV = random_logits(params, seed=3)
    used = BeamSearch(params, prompts, VOCAB, "cpu")
    before = {name: t.data_ptr() for name, t in used.state_dict().items()}
    used.step(logits_SRV[0])
    used.adopt(BeamSearch(later, prompts[::-1], VOCAB, "cpu"))
    for logits_RV in logits_SRV:
        used.step(logits_RV)
    assert used.results() == run(later, prompts[::-1], logits_SRV)
    assert {name: t.data_ptr() for name, t in used.state_dict().items()} == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_captured_step_repeats_the_cpu():
    params, prompts = make_mixed_batch()
    logits_SRV = random_logits(params, seed=4)
    state = BeamSearch(params, prompts, VOCAB, "cuda")
    logits_RV = logits_SRV[0].cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        state.step(logits_RV)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state.step(logits_RV)
    state.adopt(BeamSearch(params, prompts, VOCAB, "cuda"))
    for step_logits_RV in logits_SRV:
        logits_RV.copy_(step_logits_RV)
        graph.replay()
    expected = run(params, prompts, logits_SRV)
    for actual, truth in zip(state.results(), expected, strict=True):
        assert [h.tokens for h in actual] == [h.tokens for h in truth]
        assert [h.score for h in actual] == pytest.approx([h.score for h in truth], rel=1e-5)
