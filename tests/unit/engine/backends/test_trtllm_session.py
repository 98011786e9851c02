"""Sessions over a fake tensorrt_llm: what it is asked, and what its answers become."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.backends.trtllm import backend
from engine.comm import World
from engine.config import ModelConfig
from engine.errors import EngineError, RequestError, UserError
from engine.limits import BuildLimits
from engine.mapping import Mapping
from engine.quant import QuantConfig
from engine.record import EngineRecord
from engine.sampling import FinishReason, SamplingParams
from tests.unit.engine.backends.fake_library import VOCAB, FakeLibrary

RECORD = EngineRecord(
    config=ModelConfig(vocab_size=VOCAB),
    dtype="float16",
    quant=QuantConfig(),
    mapping=Mapping(),
    limits=BuildLimits(2, 16, 8, max_beam_width=2, gather_all_token_logits=True),
    layout_version=0,
    backend="tensorrt_llm",
)
GREEDY = SamplingParams(max_new_tokens=4)
PROMPTS = [[1, 2, 3], [4]]


def open_session(record: EngineRecord = RECORD, window: int | None = None):
    return backend.open(Path("e"), record, World(), device=None, max_attention_window=window)


@pytest.fixture
def library(monkeypatch) -> FakeLibrary:
    return FakeLibrary.install(monkeypatch)


@pytest.fixture
def python_library(monkeypatch) -> FakeLibrary:
    return FakeLibrary.install(monkeypatch, has_cpp=False)


def test_the_cpp_runner_gets_the_limits(library):
    open_session(window=7)
    assert library.runner.opened == {
        "engine_dir": "e",
        "rank": 0,
        "max_batch_size": 2,
        "max_input_len": 16,
        "max_output_len": 8,
        "max_beam_width": 2,
        "max_attention_window_size": [7],
    }


def test_the_python_runner_where_there_is_no_other(python_library):
    open_session()
    assert python_library.runner.opened == {"engine_dir": "e", "rank": 0}
    with pytest.raises(UserError, match="ModelRunner of this TensorRT-LLM has no such setting"):
        open_session(window=7)


def test_libraries_without_engines_are_refused(library, monkeypatch):
    import tensorrt_llm

    monkeypatch.setattr(tensorrt_llm.runtime, "ModelRunnerCpp", None)
    monkeypatch.setattr(tensorrt_llm.runtime, "ModelRunner", None)
    with pytest.raises(UserError, match="0.0.fake has no TensorRT engines any more"):
        open_session()


def test_an_engine_the_library_cannot_open(library, monkeypatch):
    import tensorrt_llm

    def fail(*args, **options):
        raise RuntimeError("version tag\ndoes not match")

    monkeypatch.setattr(tensorrt_llm.runtime.ModelRunnerCpp, "from_dir", fail)
    with pytest.raises(EngineError, match=r"by tensorrt_llm 0.0.fake \(version tag does not match"):
        open_session()


def test_greedy_answers(library):
    first, second = open_session().generate(PROMPTS, [GREEDY] * 2)
    [call] = library.runner.calls
    assert call == {
        "prompts": PROMPTS,
        "max_new_tokens": 4,
        "end_id": 2,
        "pad_id": 0,
        "top_k": 1,
        "top_p": 0.0,
        "temperature": 1.0,
        "output_sequence_lengths": True,
        "return_dict": True,
    }
    assert (first.prompt_index, second.prompt_index) == (0, 1)
    for result in (first, second):
        assert result.beams[0].tokens == (5, 6, 7, 8)
        assert result.beams[0].reason is FinishReason.LENGTH


ENDS = {
    "end id": ({"end_ids": (8,)}, (5, 6, 7), FinishReason.END_ID),
    "second end id": ({"end_ids": (2, 8)}, (5, 6, 7), FinishReason.END_ID),
    "stop word": ({"stop_words": ((7, 8),)}, (5, 6, 7, 8), FinishReason.STOP_WORDS),
    "end id left out": ({"max_new_tokens": 6}, (5, 6, 7, 8), FinishReason.END_ID),
}


@pytest.mark.parametrize("changes, tokens, reason", ENDS.values(), ids=ENDS)
def test_reasons(library, changes, tokens, reason):
    params = replace(GREEDY, **changes)
    [result] = open_session().generate(PROMPTS[:1], [params])
    assert (result.beams[0].tokens, result.beams[0].reason) == (tokens, reason)


def test_sampling_is_translated(library):
    params = SamplingParams(
        max_new_tokens=4,
        end_ids=(2, 7),
        min_length=2,
        temperature=0.5,
        top_k=0,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        no_repeat_ngram_size=3,
        random_seed=11,
        stop_words=((9, 10),),
        bad_words=((3,),),
    )
    open_session().generate(PROMPTS[:1], [params])
    [call] = library.runner.calls
    expected = {
        "end_id": 2,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 0,
        "top_p": 1.0,  # 0 would be unset, which makes it greedy
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "no_repeat_ngram_size": 3,
        "random_seed": 11,
        "stop_words_list": [[[9, 10], [7]]],
        "bad_words_list": [[[3]]],
    }
    assert {name: call[name] for name in expected} == expected


def test_the_python_runners_words(python_library):
    """int32 [batch, 2, length]: all tokens, and where each word ends, filled up with -1."""
    params = [replace(GREEDY, stop_words=((9, 10), (11,))), replace(GREEDY, stop_words=((12,),))]
    open_session().generate(PROMPTS, [replace(p, min_length=2) for p in params])
    [call] = python_library.runner.calls
    assert call["min_length"] == 2
    assert call["stop_words_list"].dtype == torch.int32
    assert call["stop_words_list"].tolist() == [
        [[9, 10, 11], [2, 3, -1]],
        [[12, 0, 0], [1, -1, -1]],
    ]


def test_settings_that_a_version_lacks_are_refused(python_library):
    session = open_session()
    params = replace(GREEDY, top_k=0, min_p=0.2)
    with pytest.raises(RequestError, match="^--min_p 0.2: this version of TensorRT-LLM has no"):
        session.generate(PROMPTS[:1], [params])
    assert python_library.runner.calls == []


def test_beams_and_log_probs(library):
    params = replace(GREEDY, num_beams=2, length_penalty=0.5, log_probs=True)
    [result] = open_session().generate(PROMPTS[:1], [params])
    assert [beam.tokens for beam in result.beams] == [(5, 6, 7, 8), (6, 7, 8, 9)]
    assert result.beams[0].log_probs == (-0.5,) * 4
    assert result.beams[0].cum_log_prob == -2.0
    [call] = library.runner.calls
    assert (call["num_beams"], call["length_penalty"]) == (2, 0.5)


def test_requests_that_differ_are_batches_of_their_own(library):
    warm = replace(GREEDY, top_k=0, temperature=0.7)
    params = [GREEDY, replace(GREEDY, stop_words=((9,),)), GREEDY, warm]
    results = open_session().generate([[1], [2], [3], [4]], params)
    assert [call["prompts"] for call in library.runner.calls] == [[[1], [2]], [[3]], [[4]]]
    assert [result.prompt_index for result in results] == [0, 1, 2, 3]


def test_streams(library):
    steps = list(open_session().stream([[1], [2], [3]], [GREEDY] * 3, 2))
    assert [[r.beams[0].tokens for r in step] for step in steps] == [
        [(5, 6)] * 2,
        [(5, 6, 7, 8)] * 2,
        [(5, 6, 7, 8)] * 2 + [(5, 6)],
        [(5, 6, 7, 8)] * 3,
    ]
    assert steps[0][0].beams[0].reason is FinishReason.NOT_FINISHED
    assert all(r.beams[0].reason is FinishReason.LENGTH for r in steps[-1])
    with pytest.raises(RequestError, match="--streaming cannot be combined with --num_beams"):
        next(open_session().stream([[1]], [replace(GREEDY, num_beams=2)], 1))


class Follower(World):
    """A rank that hears what `told` holds, in order."""

    rank, size = 1, 2

    def __init__(self, told):
        self.told = list(told)

    def bcast(self, value, root=0):
        assert value is None, "only the leader has answers"
        return self.told.pop(0)


def test_other_ranks_hear_the_leader(library, monkeypatch):
    """The C++ runner answers on the first rank only."""
    answers = open_session().generate(PROMPTS, [GREEDY] * 2)
    monkeypatch.setattr(library.runner, "generate", lambda *args, **options: [])
    record = replace(RECORD, mapping=Mapping(2, 0, 2, 1))
    world = Follower([answers, answers, answers, None])
    session = backend.open(Path("e"), record, world, device=None, max_attention_window=None)
    assert session.info.mapping.rank == 1
    assert session.generate(PROMPTS, [GREEDY] * 2) == answers
    assert list(session.stream(PROMPTS, [GREEDY] * 2, 1)) == [answers, answers]


def test_logits(library):
    session = open_session()
    found = session.score(PROMPTS)
    assert [tuple(logits.shape) for logits in found] == [(3, VOCAB), (1, VOCAB)]
    assert found[0].unique().tolist() == [3.0]
    [result] = session.generate(PROMPTS[:1], [GREEDY], generation_logits=True)
    assert result.generation_logits.shape == (4, VOCAB)


REFUSED = [
    ([[1] * 17], GREEDY, "--max_input_len 16"),
    ([[1]], replace(GREEDY, max_new_tokens=9), "--max_output_len 9 exceeds"),
    ([[1]], replace(GREEDY, num_beams=3), "--num_beams 3 exceeds"),
    ([[VOCAB]], GREEDY, str(VOCAB)),
]


@pytest.mark.parametrize("prompts, params, message", REFUSED)
def test_requests_beyond_the_engine(library, prompts, params, message):
    with pytest.raises(RequestError, match=message):
        open_session().generate(prompts, [params])


def test_logits_need_an_engine_that_keeps_them(library):
    limits = replace(RECORD.limits, gather_all_token_logits=False)
    session = open_session(replace(RECORD, limits=limits))
    with pytest.raises(RequestError, match="without --gather_all_token_logits"):
        session.score(PROMPTS)
