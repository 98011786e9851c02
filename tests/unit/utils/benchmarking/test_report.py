"""Records in files, and tables."""

from __future__ import annotations

import json

import pytest

from engine.errors import UserError
from utils.benchmarking.machine import command, file_stem
from utils.benchmarking.report import append_record, make_table, number, results_file


def test_records_are_appended(tmp_path):
    path = tmp_path / "new" / "card.json"
    append_record(path, {"a": 1})
    append_record(path, {"b": "×"})
    assert json.loads(path.read_text(encoding="utf-8")) == [{"a": 1}, {"b": "×"}]


@pytest.mark.parametrize("text", ["{}", "[1]", "nonsense"])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"--json .*other\.json is there and is no list of bench"):
        append_record(path, {"a": 1})
    assert path.read_text() == text


def test_records_go_to_their_device_unless_a_file_is_named():
    record = {"device": "NVIDIA H200 (141 GB)"}
    own = ("benchmarks", "results", "nvidia-h200-141-gb.json")
    assert results_file("", record).parts[-3:] == own
    assert str(results_file("mine.json", record)) == "mine.json"
    assert file_stem("Intel(R) Xeon(R) 8480+") == "intel-r-xeon-r-8480"


def test_tables_are_aligned():
    assert make_table(("a", "long"), [("wide", "1"), ("b", "22")]).splitlines() == [
        "| a    | long |",
        "| ---- | ---- |",
        "| wide | 1    |",
        "| b    | 22   |",
    ]


def test_what_was_not_measured_is_a_dash():
    show = number("share", factor=100)
    assert show({"share": 0.853}) == "85.3"
    assert show({"share": None}) == show({}) == "–"


def test_commands_can_be_pasted():
    assert command("-m benchmarks.peers", ["--out", "a b"]) == (
        "python -m benchmarks.peers --out 'a b'"
    )
