"""Tables, files and checks, from outcomes that are written down here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.test_summarize_flags import make_plan
from utils.evaluation.checks import find_failures
from utils.evaluation.plan import Checks
from utils.evaluation.prepare import Prepared
from utils.evaluation.report import Report
from utils.evaluation.task import Agreement, Case, Likelihood, Outcome, Rules, Speed, Task
from utils.generation import Decoding

CASES = (Case("0", (5, 6, 7), "first"), Case("1", (8,), "second"))


def scores(*values: float) -> tuple[dict[str, float], ...]:
    return tuple(dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), v) for v in values)


HF = Outcome(
    name="transformers",
    mode="fp16",
    is_reference=True,
    answers=((1, 2), (3, 4)),
    texts=("one two", "drei"),
    scores=scores(20, 40),
    likelihood=Likelihood(2.302585093 * 50, 50),
    speed=Speed(4, 2.0, 0.25),
    memory=3 * 2**20,
)
ENGINE = replace(
    HF,
    name="a/1-gpu",
    mode="float16, w8a16",
    is_reference=False,
    answers=((1, 2), (3, 5)),
    texts=("one two", "fünf"),
    scores=scores(19, 39),
    likelihood=Likelihood(2.302585093 * 51, 50),
    speed=Speed(4, 0.5, 0.0625),
    memory=None,
    agreement=Agreement(2, 1, 3, 4, 1, 0.0125, 1),
)
OTHER = replace(ENGINE, name="b/1-gpu", scores=scores(0, 60), likelihood=None)


def make_report(*outcomes: Outcome, failures: tuple[str, ...] = ()) -> Report:
    rules = Rules(Decoding(), 7, end_ids=(2,), pad_id=0)
    prepared = Prepared(Task(CASES, rules, 2), (), None, ("a note",))
    engines = [f"/e/{o.name}" for o in outcomes if not o.is_reference]
    return Report(make_plan(*engines), prepared, outcomes, failures)


def cells(page: str) -> list[list[str]]:
    rows = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_tables():
    page = make_report(HF, ENGINE).to_markdown()
    rows = cells(page)
    assert [row[:3] for row in rows[::4]] == [
        ["side", "mode", "ROUGE-1"],
        ["side", "mode", "perplexity"],
        ["side", "mode", "device"],
    ]
    assert rows[2] == ["transformers", "fp16", *["30.00 [20.00, 40.00]"] * 4]
    assert rows[3] == ["a/1-gpu", "float16, w8a16", *["29.00 [19.00, 39.00]"] * 4]
    assert rows[6][2:] == ["10.0000", "–", "–", "–", "–"]
    assert rows[7][2:] == ["10.4713", "1/2", "3/4 (75.0 %)", "1", "1.25e-02"]
    assert rows[10][2:] == ["cpu", "2.0", "2.00", "250.0", "3"]
    assert rows[11][2:] == ["cpu", "8.0", "0.50", "62.5", "–"]
    assert page.startswith("# summarize: 2 articles, batches of 2, prompts of up to 3 tokens")
    assert page.endswith("\n\nNote: a note")


def test_files(tmp_path):
    make_report(HF, ENGINE, failures=("it failed",)).write(str(tmp_path / "new" / "out"))
    folder = tmp_path / "new" / "out"
    assert {path.name for path in folder.iterdir()} == {
        "report.json", "report.md", "transformers.jsonl", "a_1-gpu.jsonl",
    }  # fmt: skip
    assert (folder / "report.md").read_text(encoding="utf-8").endswith("\n\nit failed\n")
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert found["failures"] == ["it failed"]
    hf, engine = found["sides"]
    assert hf["rouge"]["rouge1"] == {"mean": 30, "low": 20, "high": 40}
    assert engine["rouge1_minus_transformers"] == {"mean": -1, "low": -1, "high": -1}
    assert engine["agreement"]["matched"] == 3
    assert (engine["tokens_per_second"], engine["first_token_seconds"]) == (8, 0.0625)
    assert (hf["peak_memory_bytes"], engine["peak_memory_bytes"]) == (3 * 2**20, None)
    lines = (folder / "a_1-gpu.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1]) == {
        "article": "1",
        "prompt_tokens": 1,
        "tokens": [3, 5],
        "text": "fünf",
        "highlights": "second",
        **dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 39),
    }
    assert "fünf" in lines[1]


def test_several_engines_get_a_chart(tmp_path):
    make_report(HF, ENGINE, OTHER).write(str(tmp_path))
    with Image.open(tmp_path / "comparison.png") as chart:
        chart.load()
        assert chart.format == "PNG" and min(chart.size) > 200
        # Grey for transformers, blue for engines, and more than a blank page.
        colours = {colour for _, colour in chart.convert("RGB").getcolors(2**24)}
    assert {(153, 153, 153), (31, 119, 180)} <= colours


def test_report_without_scores_has_no_such_table():
    side = replace(ENGINE, scores=(), likelihood=None, agreement=None)
    page = make_report(side).to_markdown()
    assert [row[2] for row in cells(page)] == ["device", "-" * 6, "cpu"]


@pytest.mark.parametrize(
    ("checks", "outcomes", "said"),
    [
        (Checks(None, None), (HF, ENGINE), []),
        (Checks(29.0, 1.0), (HF, replace(ENGINE, likelihood=None)), []),
        (
            Checks(29.5, None),
            (HF, ENGINE, OTHER),
            [
                "accuracy check failed: ROUGE-1 of a/1-gpu is 29.00, below "
                "--tensorrt_llm_rouge1_threshold 29.5"
            ],
        ),
        (
            Checks(None, 0.5),
            (HF, ENGINE, OTHER),
            [
                "parity check failed: a/1-gpu and transformers differ by 1.00 points in ROUGE-1 "
                "(29.00, 30.00), 1.00 points in ROUGE-2 (29.00, 30.00), 1.00 points in ROUGE-L "
                "(29.00, 30.00), 1.00 points in ROUGE-Lsum (29.00, 30.00), 4.71 % in perplexity "
                "(10.47, 10.00), more than --check_parity 0.5"
            ],
        ),
        (
            Checks(None, 4.0),
            (HF, ENGINE),
            [
                "parity check failed: a/1-gpu and transformers differ by 4.71 % in perplexity "
                "(10.47, 10.00), more than --check_parity 4"
            ],
        ),
    ],
)
def test_checks(checks, outcomes, said):
    assert find_failures(checks, outcomes) == said


def test_names_of_files_are_no_paths(tmp_path):
    make_report(replace(ENGINE, name="../x/y")).write(str(tmp_path))
    assert {Path(name).name for name in ("report.json", ".._x_y.jsonl")} <= {
        path.name for path in tmp_path.iterdir()
    }
