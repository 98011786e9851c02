"""From a plan to token ids: prompts, windows, end tokens, and what does not fit together."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import ModelConfig
from engine.errors import UserError
from engine.limits import BuildLimits
from engine.mapping import Mapping
from engine.quant import QuantConfig
from engine.record import EngineRecord
from tests.cli.test_summarize_flags import parse
from tests.conftest import ROOT
from utils.datasets import load_rows
from utils.evaluation.plan import plan_evaluation
from utils.evaluation.prepare import Prepared, check_vocabulary, make_prompt, prepare
from utils.tokenizer import load_tokenizer

TINY_YI = ROOT / "models" / "tiny-yi"
SAMPLE = ROOT / "tests" / "data" / "cnn_dailymail"
HELDOUT = TINY_YI / "heldout.txt"

RECORD = EngineRecord(
    config=ModelConfig(vocab_size=4096, num_layers=6, hidden_size=256),
    dtype="float32",
    quant=QuantConfig(),
    mapping=Mapping(),
    limits=BuildLimits(),
    layout_version=1,
    generation={"eos_token_id": [2, 9]},
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_YI)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(*flags, **changes of the record): the prepared task for an engine and its tokenizer."""
    monkeypatch.chdir(tmp_path)

    def make(*flags: str, **changes) -> Prepared:
        record = replace(RECORD, **changes)
        monkeypatch.setattr("engine.backends.read_record", lambda folder: record)
        common = ["--test_engine", "--engine_dir", ".", "--tokenizer_dir", str(TINY_YI)]
        data = [] if "--dataset_path" in flags else ["--dataset_path", str(SAMPLE)]
        return prepare(plan_evaluation(parse(*common, *data, *flags)))[1]

    return make


def test_prompt_text():
    assert make_prompt("They did n't go . ") == "They didn't go .  TL;DR:"


def test_cases(make, tokenizer):
    task = make("--max_ite", "3").task
    rows = load_rows(SAMPLE, split="test", columns=("article", "highlights"), limit=3)
    assert [case.reference for case in task.cases] == [row["highlights"] for row in rows]
    assert [case.prompt for case in task.cases] == [
        tuple(tokenizer.encode(row["article"] + " TL;DR:")) for row in rows
    ]
    assert task.windows == ()


def test_prompts_keep_their_last_tokens(make):
    whole, cut = make("--max_ite", "2"), make("--max_ite", "2", "--max_input_length", "50")
    assert [case.prompt[-50:] for case in whole.task.cases] == [c.prompt for c in cut.task.cases]
    assert cut.notes == ()


def test_engine_that_is_too_short_cuts_prompts_and_says_how_many(make):
    lengths = [len(case.prompt) for case in make("--max_ite", "12").task.cases]
    limit = sorted(lengths)[4]
    found = make("--max_ite", "12", limits=BuildLimits(max_input_len=limit))
    assert max(len(case.prompt) for case in found.task.cases) == limit
    count = sum(length > limit for length in lengths)
    assert list(found.notes) == [
        f"{count} of 12 prompts are cut to their last {limit} tokens, the engine's "
        "--max_input_len; build it with more to keep them whole"
    ]


def test_both_sides_end_at_the_tokenizers_and_the_engines_tokens(make):
    rules = make("--max_ite", "1").task.rules
    assert (rules.end_ids, rules.pad_id) == ((2, 7, 9), 0)
    rules = make("--max_ite", "1", "--end_id", "5", "--pad_id", "3").task.rules
    assert (rules.end_ids, rules.pad_id) == ((5,), 3)


def test_words_become_tokens(make, tokenizer):
    rules = make("--max_ite", "1", "--stop_words", "module", "--bad_words", "file").task.rules
    assert rules.stop_words == tokenizer.word_ids("module")
    assert rules.bad_words == tokenizer.word_ids("file")


def test_generation_needs_no_highlights(make, tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"article": "The module"}))
    found = make("--eval_task", "generate", "--dataset_path", "a.jsonl")
    assert [case.prompt for case in found.task.cases] == [tuple(tokenizer.encode("The module"))]
    with pytest.raises(UserError, match="has no column 'highlights'"):
        make("--dataset_path", "a.jsonl")


def test_windows_of_a_text_file_need_no_data_set(make, tokenizer):
    task = make("--eval_task", "ppl", "--ppl_file", str(HELDOUT), "--dataset_path", "none").task
    ids = tokenizer.encode(HELDOUT.read_text(encoding="utf-8"))
    assert task.cases == ()
    assert [token for window in task.windows for token in window] == ids
    assert {len(window) for window in task.windows[:-1]} == {512}


def test_windows_of_articles_do_not_cross(make, tokenizer):
    found = make("--eval_ppl", "--max_ite", "2", limits=BuildLimits(max_input_len=100))
    rows = load_rows(SAMPLE, split="test", columns=("article",), limit=2)
    texts = [tokenizer.encode(row["article"]) for row in rows]
    assert [len(window) for window in found.task.windows] == [
        size for ids in texts for size in (100, 100, len(ids) - 200)
    ]
    assert found.notes[-1].startswith("perplexity is measured in windows of 100 tokens, the engi")


def test_batches_that_an_engine_splits_are_named(make):
    [note] = make("--max_ite", "1", "--batch_size", "9").notes
    assert note == (
        "--engine_dir . was built for --max_batch_size 8 and answers batches of 9 in parts"
    )


def test_another_model_is_named(make, write_hf, tmp_path):
    write_hf(tmp_path / "hf", vocab_size=4096)
    flags = ("--max_ite", "1", "--test_hf", "--hf_model_location", str(tmp_path / "hf"))
    assert make(*flags).notes == (
        "--engine_dir . has 6 layers of width 256 and --hf_model_location 3 of 64: they are "
        "different models",
    )
    found = make("--max_ite", "1", "--test_hf", "--hf_model_location", str(TINY_YI))
    assert (found.notes, found.hf_dir) == ((), TINY_YI)


def test_tokenizer_is_the_checkpoints_then_the_engines(make, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.backends.read_record", lambda folder: RECORD)
    engine = tmp_path / "engine"
    engine.mkdir()
    flags = ("--test_engine", "--engine_dir", "engine", "--dataset_path", str(SAMPLE))
    with pytest.raises(UserError, match="^--engine_dir engine holds no tokenizer; name the check"):
        prepare(plan_evaluation(parse(*flags)))
    whole = prepare(plan_evaluation(parse(*flags, "--model_dir", str(TINY_YI))))[1]
    shutil.copy(TINY_YI / "tokenizer.model", engine)
    assert prepare(plan_evaluation(parse(*flags)))[1].task.cases == whole.task.cases


@pytest.mark.parametrize("vocab_size", [4096, 4096 + 64, 4096 + 1023])
def test_vocabularies_that_are_padded_fit(tokenizer, vocab_size):
    check_vocabulary(tokenizer, vocab_size, "x")


@pytest.mark.parametrize("vocab_size", [4095, 97, 64000])
def test_other_vocabularies_do_not(make, vocab_size, write_hf, tmp_path):
    said = f"has a vocabulary of {vocab_size} and the tokenizer one of 4096, which is another; name"
    with pytest.raises(UserError, match=f"^--engine_dir . {said}"):
        make(config=replace(RECORD.config, vocab_size=vocab_size))
    write_hf(tmp_path / "hf", vocab_size=vocab_size)
    with pytest.raises(UserError, match=f"^--hf_model_location {tmp_path / 'hf'} {said}"):
        make("--test_hf", "--hf_model_location", str(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--output_len", "513"],
            "--output_len 513 exceeds --max_output_len 512 of --engine_dir .",
        ),
        (["--num_beams", "2"], "--num_beams 2 exceeds --max_beam_width 1 of --engine_dir .; ask"),
        (["--top_k", "-1"], "--top_k -1 is not possible"),
        (["--dataset_path", "none"], "--dataset_path none does not exist; name a file, a folder"),
        (["--dataset_path", "empty.jsonl"], "--dataset_path: 'article' of row 0 is empty; leave"),
        (["--eval_ppl", "--ppl_file", "none"], "--ppl_file none cannot be read: No such file or"),
        (["--eval_ppl", "--ppl_file", "bytes"], "--ppl_file bytes cannot be read: byte 1 is not"),
        (["--eval_ppl", "--ppl_file", "short"], "--ppl_file short has no text of two tokens for"),
        (["--output_dir", "short"], "--output_dir .*short.* cannot be written"),
    ],
)
def test_refusals(flags, said, make, tmp_path):
    (tmp_path / "empty.jsonl").write_text(json.dumps({"article": "", "highlights": "a"}))
    (tmp_path / "bytes").write_bytes(b"a\xff")
    (tmp_path / "short").write_text("a")
    task = ["--eval_task", "generate"] if "empty.jsonl" in flags else []
    with pytest.raises(UserError, match=f"^{said}") as raised:
        make(*flags, *task)
    assert "\n" not in str(raised.value)
    assert not Path(tmp_path / "report.json").exists()
