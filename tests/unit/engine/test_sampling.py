"""Sampling against transformers' logits processors and against arithmetic by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.errors import RequestError
from engine.kernels import api, reference
from engine.kernels.reference import draw
from engine.sampling import FinishReason, Sampler, SamplingParams

VOCAB = 211
END = 2
# Few different tokens, so that n-grams and words repeat.
PROMPTS = ([5, 6, 7, 5, 6], [9, 8, 9], [4], [3, 5, 6, 9, 8, 9, 5])
NEW = ([7, 5, 6], [8, 9, 9], [4, 4, 4], [6, 9, 8])

SAMPLE = {"top_k": 0}
CASES = {
    "greedy": {},
    "repetition": {"repetition_penalty": 1.4},
    "repetition_reward": {"repetition_penalty": 0.7},
    "ngram_1": {"no_repeat_ngram_size": 1},
    "ngram_2": {"no_repeat_ngram_size": 2},
    "ngram_3": {"no_repeat_ngram_size": 3},
    "ngram_longer_than_history": {"no_repeat_ngram_size": 40},
    "bad_token": {"bad_words": ((17,),)},
    "bad_words": {"bad_words": ((17,), (6, 33), (9, 9, 34), (1, 2, 3, 35), (8, 9, 36), (9, 37))},
    "min_length_met": {"min_length": 3},
    "min_length": {"min_length": 4, "end_ids": (END, 11)},
    "min_length_default": {"min_length": 1, "end_ids": (END, 11)},
    "temperature": {**SAMPLE, "temperature": 0.6},
    "temperature_ignored": {"temperature": 0.6},
    "top_k": {"top_k": 7},
    "top_k_beyond_vocabulary": {"top_k": 5000},
    "top_p": {**SAMPLE, "top_p": 0.8},
    "top_p_tiny": {**SAMPLE, "top_p": 1e-6},
    "top_p_one": {**SAMPLE, "top_p": 1.0},
    "top_k_and_p": {"top_k": 20, "top_p": 0.7},
    "min_p": {**SAMPLE, "min_p": 0.2},
    "all_warpers": {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    "all_processors": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "bad_words": ((5,), (9, 10)),
        "min_length": 8,
    },
    "everything": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words": ((5,), (9, 10)),
        "min_length": 8,
        "temperature": 0.8,
        "top_p": 0.95,
        "min_p": 0.01,
        **SAMPLE,
    },
}


def make_params(**fields) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 16, "end_ids": (END,), **fields})


def random_logits(batch: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed))


def make_reference(p: SamplingParams, prompt_length: int) -> LogitsProcessorList:
    """The processors that `generate` would make, in its order."""
    ends = list(p.end_ids)
    found = LogitsProcessorList()
    if p.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(p.no_repeat_ngram_size))
    if p.bad_words:
        found.append(NoBadWordsLogitsProcessor([list(word) for word in p.bad_words]))
    if p.min_length > 1:
        found.append(MinNewTokensLengthLogitsProcessor(prompt_length, p.min_length, ends))
    if p.top_k == 1:
        return found
    if p.temperature != 1:
        found.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        found.append(TopKLogitsWarper(p.top_k))
    if 0 < p.top_p < 1:
        found.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        found.append(MinPLogitsWarper(p.min_p))
    return found


def extend(sampler: Sampler, columns: list[list[int]]) -> None:
    """Give each row of the history these new tokens."""
    for tokens in zip(*columns, strict=True):
        alive_B = torch.ones(len(tokens), dtype=torch.bool)
        sampler.history.append(torch.tensor(tokens), alive_B)


def expect_processed(params, prompts, new, logits_BV) -> torch.Tensor:
    rows = []
    for p, prompt, tokens, logits_V in zip(params, prompts, new, logits_BV, strict=True):
        ids = torch.tensor([prompt + tokens])
        rows.append(make_reference(p, len(prompt))(ids, logits_V[None].clone())[0])
    return torch.stack(rows)


@pytest.mark.parametrize("case", CASES)
def test_processed_logits_equal_transformers(case):
    params = [make_params(**CASES[case])] * len(PROMPTS)
    sampler = Sampler(params, PROMPTS, VOCAB, "cpu")
    logits_BV = random_logits(len(PROMPTS))
    before = logits_BV.clone()
    for new in ([[], [], [], []], list(NEW)):
        extend(sampler, new)
        actual = sampler.processed_logits(logits_BV)
        torch.testing.assert_close(actual, expect_processed(params, PROMPTS, new, logits_BV))
    assert logits_BV.equal(before)


def test_rows_of_a_batch_keep_their_own_parameters():
    params = [make_params(**fields) for fields in CASES.values()]
    prompts = [PROMPTS[i % 4] for i in range(len(params))]
    new = [NEW[i % 4] for i in range(len(params))]
    sampler = Sampler(params, prompts, VOCAB, "cpu")
    extend(sampler, new)
    logits_BV = random_logits(len(params), seed=1)
    expected = expect_processed(params, prompts, new, logits_BV)
    torch.testing.assert_close(sampler.processed_logits(logits_BV), expected)


def test_presence_and_frequency_count_the_output_after_repetition():
    params = [
        make_params(presence_penalty=0.5, frequency_penalty=0.25),
        make_params(presence_penalty=0.5, repetition_penalty=2.0),
        make_params(),
    ]
    sampler = Sampler(params, [[1, 3], [1, 3], [1, 3]], 6, "cpu")
    extend(sampler, [[4, 4, 5]] * 3)
    logits_BV = torch.tensor([[1.0, 1.0, 1.0, -1.0, 2.0, -2.0]]).repeat(3, 1)
    expected = torch.tensor(
        [
            # 4 came twice: 2 - 0.5 - 2 * 0.25; 5 came once: -2 - 0.5 - 0.25; prompt is free
            [1.0, 1.0, 1.0, -1.0, 1.0, -2.75],
            # prompt 1 and 3: 1 / 2, -1 * 2; output 4 and 5: 2 / 2 - 0.5, -2 * 2 - 0.5
            [1.0, 0.5, 1.0, -2.0, 0.5, -4.5],
            [1.0, 1.0, 1.0, -1.0, 2.0, -2.0],
        ]
    )
    torch.testing.assert_close(sampler.processed_logits(logits_BV), expected)


def test_ties_at_the_border_are_kept_whole():
    params = [make_params(top_k=2), make_params(top_k=0, top_p=0.5)]
    sampler = Sampler(params, [[1], [1]], 4, "cpu")
    scores = torch.log(torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.4, 0.2, 0.2, 0.2]]))
    assert sampler.processed_logits(scores).isfinite().all()


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_k": 0, "temperature": 0.0}])
def test_greedy_rows_take_the_lowest_id_of_the_best(fields):
    params = [make_params(**fields), make_params(top_k=0, random_seed=3)]
    logits_BV = torch.zeros(2, VOCAB)
    logits_BV[:, [30, 40, 50]] = 5.0
    assert Sampler(params, [[1], [1]], VOCAB, "cpu").step(logits_BV).tokens_B[0] == 30
    assert Sampler(params[:1], [[1]], VOCAB, "cpu").step(logits_BV[:1]).tokens_B[0] == 30


def test_drawn_tokens_follow_the_processed_distribution():
    rows, vocab = 6000, 12
    fields = {"temperature": 1.3, "top_k": 9, "top_p": 0.95, "repetition_penalty": 1.5}
    params = [make_params(**fields, max_new_tokens=1, random_seed=seed) for seed in range(rows)]
    logits_BV = random_logits(1, vocab, seed=4).expand(rows, -1).div(2)
    tokens_B = Sampler(params, [[3, 4]] * rows, vocab, "cpu").step(logits_BV).tokens_B
    scores = make_reference(params[0], 2)(torch.tensor([[3, 4]]), logits_BV[:1].clone())
    expected_V = rows * scores.softmax(-1)[0]
    counts_V = tokens_B.bincount(minlength=vocab)
    possible = expected_V > 0
    assert counts_V[~possible].sum() == 0 and 3 < possible.sum() < vocab
    chi2 = ((counts_V - expected_V)[possible] ** 2 / expected_V[possible]).sum().item()
    freedom = possible.sum().item() - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("vocab", [1, 2, 97, 64000])
@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.25, 0.5, 1 - 2**-53])
def test_draw_never_takes_an_impossible_token(vocab, uniform):
    scores_BV = random_logits(8, vocab)
    banned_BV = torch.rand(8, vocab, generator=torch.Generator().manual_seed(1)) < 0.7
    # The outermost tokens are where a rounded sum would slip.
    banned_BV[:, [0, -1]] = True
    banned_BV[:, vocab // 2] = False
    scores_BV.masked_fill_(banned_BV, -math.inf)
    tokens_B = draw(scores_BV, torch.full((8,), uniform, dtype=torch.float64))
    assert scores_BV.gather(1, tokens_B[:, None]).isfinite().all()


def test_draw_inverts_the_distribution_function_in_vocabulary_order():
    scores_BV = torch.log(torch.tensor([[0.0, 0.5, 0.25, 0.0, 0.25, 0.0]])).expand(6, -1)
    uniform_B = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.99], dtype=torch.float64)
    assert draw(scores_BV, uniform_B).tolist() == [1, 1, 2, 2, 4, 4]


def test_a_row_with_everything_banned_still_gets_a_token():
    scores_BV = torch.full((1, 5), -math.inf)
    assert 0 <= draw(scores_BV, torch.tensor([0.5], dtype=torch.float64)).item() < 5


def run(params, prompts, logits_SBV, device="cpu") -> list[list[int]]:
    sampler = Sampler(params, prompts, logits_SBV.shape[-1], device)
    for logits_BV in logits_SBV:
        sampler.step(logits_BV.to(device))
    return sampler.results()


def make_mixed_batch() -> tuple[list[SamplingParams], list[list[int]]]:
    """Every case with a seed, an end id that may come, stop words and a length of its own."""
    params = [
        make_params(**{**fields, "max_new_tokens": 9 + i % 4, "random_seed": i % 5}, stop_words=w)
        for i, fields in enumerate(CASES.values())
        for w in [((50, 51), (60,)) if i % 2 else ()]
    ]
    return params, [list(PROMPTS[i % 4]) for i in range(len(params))]


def test_results_do_not_depend_on_the_batch():
    params, prompts = make_mixed_batch()
    params += params[:3]
    prompts += prompts[:3]
    logits_SV = random_logits(12, seed=5)
    logits_SBV = logits_SV[:, None].expand(-1, len(params), -1)
    together = run(params, prompts, logits_SBV)
    reverse = run(params[::-1], prompts[::-1], logits_SBV)[::-1]
    alone = [
        run([p], [prompt], logits_SV[:, None]) for p, prompt in zip(params, prompts, strict=True)
    ]
    assert together == reverse == [rows[0] for rows in alone]
    assert len({tuple(row) for row in together}) > len(params) // 2


@pytest.mark.parametrize("log_probs", [False, True])
def test_logits_of_16_bits_give_what_their_fp32_copies_give(log_probs):
    params, prompts = make_mixed_batch()
    params = [dataclasses.replace(p, log_probs=log_probs) for p in params]
    narrow_SBV = random_logits(12, seed=10)[:, None].expand(-1, len(params), -1).bfloat16()
    assert run(params, prompts, narrow_SBV) == run(params, prompts, narrow_SBV.float())
    greedy = [make_params(log_probs=log_probs)] * 2
    steps = [
        Sampler(greedy, [[1], [2]], VOCAB, "cpu").step(logits_BV[:2])
        for logits_BV in (narrow_SBV[0], narrow_SBV[0].float())
    ]
    for narrow, wide in zip(*steps, strict=True):
        assert narrow is wide is None or torch.equal(narrow, wide)


def test_seeds_give_different_and_repeatable_streams():
    params = [make_params(top_k=0, temperature=5.0, random_seed=seed) for seed in (0, 1, 2**31, 0)]
    logits_SBV = random_logits(16, seed=6)[:, None].expand(-1, 4, -1)
    first, second, third, again = run(params, [[1]] * 4, logits_SBV)
    assert first == again and first != second != third != first


def test_step_n_uses_the_nth_number_of_the_seed():
    flat_SBV = torch.zeros(16, 2, 10)
    params = [make_params(top_k=0, end_ids=(), random_seed=seed) for seed in (4, 1234567)]
    expected = []
    for p in params:
        generator = torch.Generator().manual_seed(p.random_seed)
        uniform_S = torch.rand(16, dtype=torch.float64, generator=generator)
        expected.append((uniform_S * 10).long().tolist())
    assert run(params, [[1], [2]], flat_SBV) == expected


def force(*tokens: int, vocab: int = 20) -> torch.Tensor:
    logits_BV = torch.zeros(len(tokens), vocab)
    logits_BV[range(len(tokens)), tokens] = 9.0
    return logits_BV


STOPS = {
    "end_id": ({"end_ids": (7, 8)}, [5, 8, 9], FinishReason.END_ID, 2),
    "no_end_id": ({"end_ids": ()}, [2, 2, 2], FinishReason.LENGTH, 3),
    "length": ({}, [5, 5, 5], FinishReason.LENGTH, 3),
    "end_id_at_length": ({"end_ids": (7,)}, [5, 5, 7], FinishReason.END_ID, 3),
    "end_id_first": ({"end_ids": (7,)}, [7, 5, 5], FinishReason.END_ID, 1),
    "stop_token": ({"stop_words": ((9,), (6, 5))}, [5, 9, 5], FinishReason.STOP_WORDS, 2),
    "stop_word": ({"stop_words": ((9,), (6, 5))}, [6, 5, 5], FinishReason.STOP_WORDS, 2),
    "stop_word_at_length": ({"stop_words": ((6, 5),)}, [4, 6, 5], FinishReason.STOP_WORDS, 3),
    "stop_word_from_prompt": ({"stop_words": ((4, 5),)}, [5, 6, 6], FinishReason.LENGTH, 3),
    "stop_word_half": ({"stop_words": ((6, 5, 4),)}, [6, 5, 6], FinishReason.LENGTH, 3),
    "end_id_is_stop_word": (
        {"end_ids": (7,), "stop_words": ((7,),)},
        [7, 5, 5],
        FinishReason.END_ID,
        1,
    ),
    "min_length": ({"end_ids": (7,), "min_length": 2}, [7, 5, 7], FinishReason.END_ID, 3),
}


def test_rows_stop_for_their_reason_and_stay_stopped():
    params = [
        make_params(max_new_tokens=3, pad_id=10 + i, **fields)
        for i, (fields, *_) in enumerate(STOPS.values())
    ]
    sampler = Sampler(params, [[3, 4]] * len(params), 30, "cpu")
    scripts = [script for _, script, *_ in STOPS.values()]
    for step in range(5):
        sampled = sampler.step(force(*(script[min(step, 2)] for script in scripts), vocab=30))
        for row, (name, (_, script, _, count)) in enumerate(STOPS.items()):
            token = script[step] if step < count else 10 + row
            # A banned end id leaves the lowest id of the equal rest.
            token = 0 if (name, step) == ("min_length", 0) else token
            assert sampled.tokens_B[row] == token, (name, step)
            assert sampler.is_finished()[row] == (step + 1 >= count), (name, step)
        assert sampler.num_alive == sum(count > step + 1 for *_, count in STOPS.values())
    reasons = [FinishReason(reason) for reason in sampler.reasons_B.tolist()]
    assert reasons == [reason for *_, reason, _ in STOPS.values()]
    assert [len(row) for row in sampler.results()] == [count for *_, count in STOPS.values()]


def test_log_probs_are_the_models_own():
    params = [
        make_params(log_probs=True, repetition_penalty=5.0, bad_words=((7,),), max_new_tokens=2),
        make_params(top_k=0, temperature=0.1, end_ids=(0,)),
    ]
    sampler = Sampler(params, [[1, 2], [3]], VOCAB, "cpu")
    logits_BV = random_logits(2, seed=7)
    for step in range(3):
        sampled = sampler.step(logits_BV)
        expected = logits_BV.log_softmax(-1)[[0, 1], sampled.tokens_B]
        expected[0] = expected[0] if step < 2 else 0.0
        torch.testing.assert_close(sampled.log_probs_B, expected)
    silent = [dataclasses.replace(p, log_probs=False) for p in params]
    assert Sampler(silent, [[1], [1]], VOCAB, "cpu").step(logits_BV).log_probs_B is None


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"max_new_tokens": 0}, ["--max_output_len 0"]),
        ({"temperature": -1.0}, ["--temperature -1.0"]),
        ({"temperature": math.nan}, ["--temperature nan"]),
        ({"top_k": -1}, ["--top_k -1"]),
        ({"top_p": 1.5}, ["--top_p 1.5"]),
        ({"top_p": -0.1}, ["--top_p -0.1"]),
        ({"min_p": 2.0}, ["--min_p 2.0"]),
        ({"repetition_penalty": 0.0}, ["--repetition_penalty 0.0"]),
        ({"presence_penalty": math.inf}, ["--presence_penalty inf"]),
        ({"frequency_penalty": math.nan}, ["--frequency_penalty nan"]),
        ({"no_repeat_ngram_size": -2}, ["--no_repeat_ngram_size -2"]),
        ({"bad_words": ((),)}, ["--bad_words"]),
        ({"stop_words": ((3, -1),)}, ["--stop_words"]),
        ({"end_ids": (-1,)}, ["--end_id"]),
        ({"pad_id": -1}, ["--pad_id -1"]),
        ({"min_length": -1}, ["--min_length -1"]),
        ({"min_length": 17}, ["--min_length 17", "--max_output_len 16"]),
        ({"random_seed": -5}, ["--random_seed -5"]),
        ({"random_seed": 2**32}, ["--random_seed 4294967296"]),
        ({"num_beams": 0}, ["--num_beams 0"]),
        ({"length_penalty": math.inf}, ["--length_penalty inf"]),
        ({"num_beams": 2, "top_k": 5}, ["--top_k 5", "--num_beams 2"]),
        ({"num_beams": 2, "top_p": 0.5}, ["--top_p 0.5", "--num_beams 2"]),
        ({"num_beams": 2, "min_p": 0.5}, ["--min_p 0.5", "--num_beams 2"]),
    ],
)
def test_impossible_parameters_are_refused_by_flag(fields, words):
    with pytest.raises(RequestError) as refusal:
        make_params(**fields)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(
    "fields, prompt, words",
    [
        ({}, [], ["request 1", "no tokens"]),
        ({}, [3, VOCAB], ["request 1", str(VOCAB)]),
        ({}, [-1], ["request 1", "-1"]),
        ({"end_ids": (VOCAB,)}, [3], ["--end_id", str(VOCAB)]),
        ({"pad_id": VOCAB}, [3], ["--pad_id", str(VOCAB)]),
        ({"bad_words": ((3, VOCAB),)}, [3], ["--bad_words", str(VOCAB)]),
        ({"stop_words": ((VOCAB + 4,),)}, [3], ["--stop_words", str(VOCAB + 4)]),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(fields, prompt, words):
    with pytest.raises(RequestError) as refusal:
        Sampler([make_params(), make_params(**fields)], [[1], prompt], VOCAB, "cpu")
    assert all(word in str(refusal.value) for word in words)


def test_a_step_reads_nothing_back_to_the_host(monkeypatch):
    # Meta tensors have no values: whatever needs one, or a shape that depends on one, fails.
    for op in ("argmax", "draw", "logsumexp", "take_tokens"):
        monkeypatch.setattr(api, op, getattr(reference, op))
    params, prompts = make_mixed_batch()
    params[0] = dataclasses.replace(params[0], log_probs=True, presence_penalty=0.1)
    sampler = Sampler(params, prompts, VOCAB, "meta")
    sampled = sampler.step(torch.empty(len(params), VOCAB, device="meta"))
    assert [t.shape for t in sampled] == [(len(params),)] * 2


def test_a_step_updates_its_buffers_in_place():
    params, prompts = make_mixed_batch()
    sampler = Sampler(params, prompts, VOCAB, "cpu")
    before = {name: t.data_ptr() for name, t in sampler.state_dict().items()}
    sampler.step(random_logits(len(params)))
    assert {name: t.data_ptr() for name, t in sampler.state_dict().items()} == before


def test_a_used_sampler_adopts_another_batch_of_its_plan():
    params, prompts = make_mixed_batch()
    later = [dataclasses.replace(p, random_seed=p.random_seed + 9) for p in params]
    later_prompts = [[*prompt, 12] for prompt in prompts]
    logits_SBV = random_logits(12 * len(params), seed=8).view(12, len(params), VOCAB)
    used = Sampler(params, prompts, VOCAB, "cpu")
    used.step(logits_SBV[0])
    used.adopt(Sampler(later, later_prompts, VOCAB, "cpu"))
    for logits_BV in logits_SBV:
        used.step(logits_BV)
    assert (
        used.results() == run(later, later_prompts, logits_SBV) != run(params, prompts, logits_SBV)
    )
    other = Sampler([make_params(top_k=3)] * len(params), prompts, VOCAB, "cpu")
    assert other.plan() != used.plan()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_captured_step_repeats_the_cpu():
    params, prompts = make_mixed_batch()
    params[0] = dataclasses.replace(params[0], log_probs=True, presence_penalty=0.1)
    logits_SBV = random_logits(12 * len(params), seed=9).view(12, len(params), VOCAB)
    sampler = Sampler(params, prompts, VOCAB, "cuda")
    logits_BV = logits_SBV[0].cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        sampler.step(logits_BV)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.step(logits_BV)
    sampler.adopt(Sampler(params, prompts, VOCAB, "cuda"))
    for step_logits_BV in logits_SBV:
        logits_BV.copy_(step_logits_BV)
        graph.replay()
    assert sampler.results() == run(params, prompts, logits_SBV)
