"""summarize.py on tiny-yi: answers, scores, perplexity and divergences are transformers' own."""

from __future__ import annotations

import importlib.util
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rouge_score import rouge_scorer
from sentencepiece import SentencePieceProcessor

import summarize
from engine.backends import open_engine
from engine.comm import World
from engine.errors import CheckpointError, EngineError, UserError
from tests.cli.build_runner import run_here
from tests.conftest import ROOT
from tests.golden import truth
from tests.golden.truth import END_IDS, PAD_ID, TINY_YI
from tests.mpi import run_ranks
from utils.evaluation.engine_side import EngineSide
from utils.evaluation.hf_side import HfSide, load_model
from utils.evaluation.perplexity import perplexity
from utils.evaluation.task import Rules
from utils.generation import Decoding

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SAMPLE = ROOT / "tests" / "data" / "cnn_dailymail"
ARTICLES, NEW_TOKENS = 5, 16
SIDES = ("--test_trt_llm", "--test_hf", "--hf_model_location", str(TINY_YI), "--data_type", "fp32")
TASK = ("--dataset_path", str(SAMPLE), "--output_len", str(NEW_TOKENS), "--device", "cpu")
ENGINES = {
    "tp1": (),
    "tp2": ("--tp_size", "2"),
    "pp2": ("--pp_size", "2"),
    "int4": ("--use_weight_only", "--weight_only_precision", "int4"),
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Path:
    """A folder of fp32 engines, built without --gather_all_token_logits."""
    base = tmp_path_factory.mktemp("engines")
    for name, flags in ENGINES.items():
        where = ("--model_dir", TINY_YI, "--output_dir", base / name)
        finished = run_here(*where, "--dtype", "float32", "--max_input_len", "512", *flags)
        assert finished.status == 0, finished.stderr
    return base


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@cache
def codec() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(TINY_YI / "tokenizer.model"))


@cache
def rows() -> list[dict[str, str]]:
    lines = (SAMPLE / "3.0.0" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:ARTICLES]]


@cache
def prompts() -> list[list[int]]:
    return [codec().encode(f"{row['article']} TL;DR:") for row in rows()]


@cache
def expected() -> list[list[int]]:
    """transformers' greedy answer to each article alone, without its end token."""
    model = truth.load_model(TINY_YI)
    answers = [truth.continue_greedily(model, p, NEW_TOKENS, END_IDS) for p in prompts()]
    assert min(answer.margin for answer in answers) > truth.LEAST_MARGIN
    return [[t for t in answer.tokens if t not in END_IDS] for answer in answers]


def by_lines(text: str) -> str:
    return text.replace(". ", ".\n")


@cache
def expected_scores() -> dict[str, float]:
    """Means of rouge_score's F-measures of transformers' answers, in per cent."""
    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = rouge_scorer.RougeScorer(names)
    texts = [codec().decode(ids).strip() for ids in expected()]
    found = [
        scorer.score(row["highlights"], by_lines(text))
        for row, text in zip(rows(), texts, strict=True)
    ]
    return {n: 100 * sum(scores[n].fmeasure for scores in found) / len(found) for n in names}


@cache
def evaluate_script() -> Any:
    """models/tiny-yi/evaluate.py, whose folder is no package."""
    spec = importlib.util.spec_from_file_location("tiny_evaluate", TINY_YI / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def read_tokens(folder: Path, name: str) -> list[list[int]]:
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["tokens"] for line in lines]


def assert_identical(side: dict[str, Any]) -> None:
    means = {name: interval["mean"] for name, interval in side["rouge"].items()}
    assert means == pytest.approx(expected_scores())
    assert side["tokens_per_second"] > 0 and side["first_token_seconds"] > 0
    assert side["new_tokens"] == sum(map(len, expected()))
    if side["agreement"] is not None:
        assert side["agreement"]["identical"] == ARTICLES
        assert side["agreement"]["first"] is None
        assert side["rouge1_minus_transformers"]["mean"] == 0


@pytest.mark.mpi
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_layout_gives_transformers_summaries(batch_size, engines, tmp_path, capfd):
    """Three engines, each in a job of its own, in batches of one and of unequal prompts."""
    names = ("tp1", "tp2", "pp2")
    folders = [str(engines / name) for name in names]
    batches = math.ceil(ARTICLES / batch_size)
    data = ("--batch_size", str(batch_size), "--max_ite", str(batches))
    short = tmp_path / "articles.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    status = summarize.main(
        [*SIDES, *TASK, *data, "--dataset_path", str(short), "--engine_dir", *folders]
        + ["--output_dir", str(tmp_path / "out"), "--check_parity", "0"]
    )
    assert status == 0
    report = read_report(tmp_path / "out")
    assert [side["name"] for side in report["sides"]] == ["transformers", *names]
    for side in report["sides"]:
        assert read_tokens(tmp_path / "out", side["name"]) == expected(), side["name"]
        assert_identical(side)
    assert (tmp_path / "out" / "comparison.png").is_file()
    out = capfd.readouterr().out
    assert out.count(f"# summarize: {ARTICLES} articles") == 1
    assert out.count(f"{ARTICLES}/{ARTICLES}") == len(names)


@pytest.mark.mpi
def test_ranks_of_one_engine_share_the_work(engines, tmp_path):
    """Under a real mpirun transformers runs on rank 0; a check that fails sets the status."""
    articles = 2
    command = ["summarize.py", *SIDES, *TASK, "--max_ite", str(articles)]
    command += ["--engine_dir", str(engines / "tp2"), "--output_dir", str(tmp_path)]
    command += ["--check_accuracy", "--tensorrt_llm_rouge1_threshold", "99"]
    ended = run_ranks(2, command)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.count("accuracy check failed: ROUGE-1 of tp2 is") == 1
    assert "Traceback" not in ended.stderr
    assert ended.stdout.count(f"# summarize: {articles} articles") == 1
    report = read_report(tmp_path)
    assert [side["name"] for side in report["sides"]] == ["transformers", "tp2"]
    for side in report["sides"]:
        assert read_tokens(tmp_path, side["name"]) == expected()[:articles]
    agreement = report["sides"][1]["agreement"]
    assert (agreement["identical"], agreement["cases"]) == (articles, articles)


def test_where_sides_part(engines, tmp_path, capsys):
    """Divergences of an INT4 engine are those of its tokens, and its KL divergence there is that
    of the two models' logits."""
    flags = ("--max_ite", str(ARTICLES), "--engine_dir", str(engines / "int4"))
    checks = ("--check_accuracy", "--tensorrt_llm_rouge1_threshold", "99", "--check_parity", "90")
    assert summarize.main([*SIDES, *TASK, *flags, *checks, "--output_dir", str(tmp_path)]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("summarize")]
    assert len(said) == 1 and "accuracy check failed: ROUGE-1 of int4 is" in said[0]

    found = read_tokens(tmp_path, "int4")
    session = open_engine(engines / "int4", World(), device="cpu")
    matched, first, kls = 0, [], []
    for prompt, own, other in zip(prompts(), found, expected(), strict=True):
        same = [a == b for a, b in zip(own, other, strict=False)]
        place = same.index(False) if False in same else min(len(own), len(other))
        matched += place
        if own == other:
            continue
        first.append(place)
        context = [*prompt, *other[:place]]
        p = truth.score(truth.load_model(TINY_YI), context)[-1].double().softmax(-1)
        q = session.score([context])[0][-1].double().softmax(-1)
        kls.append((p * (p / q).log()).sum().item())
    assert kls, "an INT4 engine that gives the same answers tests nothing"
    agreement = read_report(tmp_path)["sides"][1]["agreement"]
    assert agreement == {
        "cases": ARTICLES,
        "identical": ARTICLES - len(kls),
        "matched": matched,
        "reference_tokens": sum(map(len, expected())),
        "first": min(first),
        "kl": pytest.approx(sum(kls) / len(kls), rel=1e-3),
        "kl_cases": len(kls),
    }


def test_perplexity_is_that_of_the_models_own_script(engines, tmp_path, capsys):
    """An engine built without --gather_all_token_logits, alone and beside transformers."""
    ids = truth.heldout_tokens()[:1700]
    there, predicted = evaluate_script().perplexity(truth.load_model(TINY_YI), ids)
    session = open_engine(engines / "tp1", World(), device="cpu")
    assert not session.info.limits.gather_all_token_logits
    assert perplexity(session, ids) == pytest.approx(there, rel=1e-5)

    text = codec().decode(ids)
    assert codec().encode(text) == ids
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    flags = ["--eval_task", "ppl", "--ppl_file", str(tmp_path / "text.txt")]
    where = ["--engine_dir", str(engines / "tp1"), "--output_dir", str(tmp_path)]
    assert summarize.main([*SIDES, *flags, *where, "--check_parity", "0.001"]) == 0
    for side in read_report(tmp_path)["sides"]:
        assert side["perplexity"] == pytest.approx(there, rel=1e-5)
        assert side["predicted_tokens"] == predicted
        assert side["rouge"] is None and side["tokens_per_second"] is None
    assert "ROUGE" not in capsys.readouterr().out


CASES = {
    "greedy": {},
    "minimum": {"min_length": 12},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("has_words", [False, True])
def test_both_sides_follow_the_same_rules(name, has_words, engines):
    """In one batch of unequal prompts, transformers' padded; stop and bad words are such that
    they come up."""
    asked = truth.cut_prompts((40, 3, 17, 90), start=3000)
    decoding = Decoding(**CASES[name])
    rules = Rules(decoding, NEW_TOKENS, END_IDS, PAD_ID)
    hf = HfSide(truth_model(), rules)
    plain = hf.generate(list(map(tuple, asked)), NEW_TOKENS)
    if has_words:
        stop, bad = plain[0][5:7], plain[2][3:4]
        rules = Rules(decoding, NEW_TOKENS, END_IDS, PAD_ID, (stop,), (bad,))
        hf = HfSide(truth_model(), rules)
    answers = hf.generate(list(map(tuple, asked)), NEW_TOKENS)
    engine = EngineSide(open_engine(engines / "tp1", World(), device="cpu"), rules)
    assert engine.generate(list(map(tuple, asked)), NEW_TOKENS) == answers
    if has_words:
        assert answers != plain
        assert answers[0][-2:] == stop and len(answers[0]) < NEW_TOKENS
        assert all(bad[0] not in answer for answer in answers)
    elif name == "greedy":
        alone = [truth.continue_greedily(truth_model(), p, NEW_TOKENS, END_IDS) for p in asked]
        assert [list(a) for a in answers] == [
            [t for t in answer.tokens if t not in END_IDS] for answer in alone
        ]


@cache
def truth_model() -> Any:
    """Another than truth.load_model's, since a side replaces its generation settings."""
    return load_model(
        TINY_YI, dtype="fp32", device="cpu", device_map_auto=False, trust_remote_code=False
    )


def test_one_engine_needs_its_ranks(engines):
    with pytest.raises(EngineError, match="was built for 2 ranks and 1 is running; start it as: m"):
        summarize.main(["--test_engine", *TASK, "--engine_dir", str(engines / "tp2")])


def test_a_job_that_fails_is_named(engines, tmp_path, capfd):
    """Its own message comes first."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in (engines / "tp1").iterdir():
        content = path.read_bytes()
        (damaged / path.name).write_bytes(content[:-9] if path.suffix == ".engine" else content)
    folders = [str(damaged), str(engines / "tp1")]
    with pytest.raises(UserError, match=r"damaged could not be evaluated \(exit status 2\); see"):
        summarize.main(["--test_engine", *TASK, "--max_ite", "1", "--engine_dir", *folders])
    assert "summarize.py: error: " in capfd.readouterr().err


def test_checkpoints_that_transformers_refuses(tmp_path, write_hf):
    options = {"dtype": "fp32", "device": "cpu", "trust_remote_code": False}
    write_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be loaded by transformers: .*; name a check"):
        load_model(tmp_path, device_map_auto=False, **options)


def test_spreading_needs_accelerate(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = {"dtype": "fp32", "device": "cpu", "trust_remote_code": False}
    with pytest.raises(UserError, match="^--hf_device_map_auto needs the package accelerate; inst"):
        load_model(TINY_YI, device_map_auto=True, **options)
