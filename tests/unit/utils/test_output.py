"""Lines and files of a run, from results written out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.decoding import Beam
from engine.errors import UserError
from engine.sampling import FinishReason
from engine.session import Result
from utils import output
from utils.output import OutputFiles
from utils.prompts import read_ids
from utils.tokenizer import load_tokenizer

TINY_YI = Path(__file__).parents[3] / "models" / "tiny-yi"
PROMPTS = [(5, 6, 7), (8,)]


def beam(*tokens: int, log_probs: tuple[float, ...] | None = None) -> Beam:
    total = None if log_probs is None else sum(log_probs)
    return Beam(tokens, FinishReason.LENGTH, log_probs, total)


def results() -> list[Result]:
    return [Result(0, (beam(10, 11), beam(12))), Result(1, (beam(13, 14, 15), beam()))]


def test_lines():
    tokenizer = load_tokenizer(TINY_YI)
    encoded = [tokenizer.encode(text) for text in ("a\nb<|im_end|>", ' "quoted"', "你好")]
    result = Result(3, tuple(beam(*ids) for ids in encoded[1:]))
    assert output.format_result(encoded[0], result, tokenizer) == [
        'Input [Text 3]: "a\nb<|im_end|>"',
        'Output [Text 3 Beam 0]: " "quoted""',
        'Output [Text 3 Beam 1]: "你好"',
    ]
    assert output.format_result(PROMPTS[0], results()[0], None) == [
        'Input [Text 0]: "5,6,7"',
        'Output [Text 0 Beam 0]: "10,11"',
        'Output [Text 0 Beam 1]: "12"',
    ]


ROWS = [[5, 6, 7, 10, 11], [5, 6, 7, 12, 2], [8, 13, 14, 15, 2], [8, 2, 2, 2, 2]]


def test_id_files_and_their_way_back(tmp_path):
    files = OutputFiles(
        output_csv=str(tmp_path / "a" / "o.csv"), output_npy=str(tmp_path / "ids.array")
    )
    files.check()
    output.write_files(files, PROMPTS, results(), end_id=2)
    array = np.load(tmp_path / "ids.array")
    assert array.dtype == np.int32 and array.tolist() == ROWS
    assert read_ids(files.output_csv) == ROWS
    np.save(tmp_path / "back.npy", array)
    assert read_ids(str(tmp_path / "back.npy"), padding={2})[3] == [8]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "back.npy",
        "ids.array",
        "o.csv",
    ]


def test_score_files(tmp_path):
    scored = [
        Result(0, (beam(1, 2, log_probs=(-0.5, -1.0)),)),
        Result(1, (beam(3, log_probs=(-2.0,)),)),
    ]
    each, total = str(tmp_path / "each.npy"), str(tmp_path / "total.npy")
    files = OutputFiles(output_log_probs_npy=each, output_cum_log_probs_npy=total)
    assert files.has_scores and not files.has_ids
    output.write_files(files, PROMPTS, scored, end_id=2)
    assert np.load(each).tolist() == [[[-0.5, -1.0]], [[-2.0, 0.0]]]
    assert np.load(total).tolist() == [[-1.5], [-2.0]]


def test_logit_files(tmp_path):
    context = [torch.arange(6.0).view(3, 2), torch.ones(1, 2)]
    generation = [torch.full((2, 2), 3.0), torch.full((1, 2), 4.0)]
    found = [
        Result(i, (beam(1),), context_logits=context[i], generation_logits=generation[i])
        for i in range(2)
    ]
    files = OutputFiles(output_logits_npy=str(tmp_path / "l.npy"))
    output.write_files(files, PROMPTS, found, end_id=2)
    assert np.load(tmp_path / "l_context.npy").tolist() == [[0, 1], [2, 3], [4, 5], [1, 1]]
    assert np.load(tmp_path / "l_generation.npy").tolist() == [
        [[[3, 3], [3, 3]]],
        [[[4, 4], [0, 0]]],
    ]


def test_broken_off_file_is_not_left_behind(tmp_path):
    path = tmp_path / "o.csv"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), output.replace_file(path, "w") as file:
        file.write("half")
        raise ZeroDivisionError
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["old"]


def test_unwritable_paths(tmp_path):
    (tmp_path / "file").touch()
    for path, message in [
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "file" / "o.csv", "cannot be written .*name a file in a folder"),
    ]:
        with pytest.raises(UserError, match=f"^--output_csv .* {message}"):
            OutputFiles(output_csv=str(path)).check()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_files_at_one_path(tmp_path):
    path = str(tmp_path / "o")
    with pytest.raises(UserError, match="^--output_csv and --output_npy name the same file"):
        OutputFiles(output_csv=path, output_npy=path).check()


def test_no_files():
    assert not OutputFiles()
    assert OutputFiles(output_logits_npy="x")
