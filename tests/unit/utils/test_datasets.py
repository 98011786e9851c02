"""Texts from files, folders, saved data sets, a cache or the hub, and one sentence for what is
wrong with them. No network may be touched."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, config, load_dataset
from huggingface_hub.errors import HTTPError

from engine import env
from engine.errors import UserError
from tests.conftest import ROOT
from utils.datasets import HUB_NAME, calibration_texts, load_rows

SAMPLE = ROOT / "tests" / "data" / "cnn_dailymail"
COLUMNS = ("article", "highlights")
ROWS = [{"article": f"text {i}", "highlights": f"gist {i}", "id": str(i)} for i in range(5)]
WANTED = [{"article": row["article"], "highlights": row["highlights"]} for row in ROWS]


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch) -> Path:
    """An empty cache and a network that may not be touched."""

    def no_network(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "default-cache"))
    return tmp_path


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS = {
    "a.jsonl": lambda path: path.write_text(lines(ROWS)),
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "a.parquet": write_parquet,
    "saved split": lambda path: Dataset.from_list(ROWS).save_to_disk(path),
    "saved splits": lambda path: DatasetDict(
        test=Dataset.from_list(ROWS), train=Dataset.from_list(ROWS[:1])
    ).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("limit", [None, 3])
def test_every_kind_of_local_data(name, limit, tmp_path):
    WRITERS[name](tmp_path / name)
    split = "train" if name == "saved split" else "test"
    rows = load_rows(tmp_path / name, split=split, columns=COLUMNS, limit=limit)
    assert rows == WANTED[:limit]


def test_folder_of_files_named_after_splits(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(ROWS[:2]))
    (tmp_path / "test.jsonl").write_text(lines(ROWS[2:]))
    assert load_rows(tmp_path, split="test", columns=COLUMNS) == WANTED[2:]


@pytest.mark.parametrize(("split", "count"), [("train", 16), ("validation", 4), ("test", 12)])
def test_sample_is_read_as_the_real_data_set_is(split, count, tmp_path):
    rows = load_rows(SAMPLE, split=split, columns=("id", *COLUMNS))
    there = load_dataset(str(SAMPLE), "3.0.0", split=split, cache_dir=str(tmp_path / "cache"))
    assert rows == there.to_list()
    assert len(rows) == len({row["id"] for row in rows}) == count
    for row in rows:
        assert 80 <= len(row["article"].split()) <= 200
        assert 1 <= len(row["highlights"].split("\n")) <= 3


def test_local_data_leaves_nothing_behind(tmp_path, isolated):
    before = sorted(SAMPLE.rglob("*"))
    load_rows(SAMPLE, split="test", columns=COLUMNS)
    assert sorted(SAMPLE.rglob("*")) == before
    assert not (isolated / "default-cache").exists()


def fill_cache(folder: Path) -> Path:
    """The layout in which `datasets` keeps what it fetched, with the sample as its content."""
    scratch = folder.with_name("scratch")
    load_dataset(str(SAMPLE), "3.0.0", cache_dir=str(scratch))
    shutil.move(scratch / "cnn_dailymail", folder / HUB_NAME.replace("/", "___"))
    return folder


@pytest.mark.parametrize("way", ["cache_dir", "dataset_path", "default"])
def test_cached_data_set_needs_no_question_to_the_hub(way, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    fill_cache(cache)
    monkeypatch.setattr(env, "hub_offline", lambda: False)
    monkeypatch.setattr(
        config, "HF_DATASETS_CACHE", str(cache if way == "default" else tmp_path / "none")
    )
    rows = load_rows(
        cache if way == "dataset_path" else None,
        split="test",
        columns=COLUMNS,
        limit=7,
        cache_dir=str(cache) if way == "cache_dir" else None,
    )
    assert rows == load_rows(SAMPLE, split="test", columns=COLUMNS, limit=7)


def test_cache_of_the_sample_is_not_taken_for_the_real_data_set(isolated):
    load_dataset(str(SAMPLE), "3.0.0", cache_dir=str(isolated / "default-cache"))
    with pytest.raises(UserError, match="is not in the cache"):
        load_rows(None, split="test", columns=COLUMNS)


def test_offline_says_at_once_what_to_do():
    with pytest.raises(
        UserError,
        match=f"^the data set {HUB_NAME} is not in the cache .* and HF_HUB_OFFLINE is set; name "
        "local data with --dataset_path, for instance tests/data/cnn_dailymail$",
    ):
        load_rows(None, split="test", columns=COLUMNS)


@pytest.mark.parametrize("error", [HTTPError("no route"), ConnectionError("refused"), OSError()])
def test_unreachable_hub_is_asked_one_short_question(error, monkeypatch):
    asked = []

    def fail(*args, timeout, **kwargs):
        asked.append(timeout)
        raise error

    monkeypatch.setattr(env, "hub_offline", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(UserError, match="and the Hugging Face hub cannot be used .*--dataset_path"):
        load_rows(None, split="test", columns=COLUMNS)
    assert len(asked) == 1 and asked[0] <= 10


def test_reachable_hub_fills_the_cache(monkeypatch, tmp_path):
    asked = []

    def fetch(*names, **options):
        asked.append((names, options))
        return iter(ROWS)

    monkeypatch.setattr(env, "hub_offline", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
    monkeypatch.setattr("datasets.load_dataset", fetch)
    rows = load_rows(None, split="test", columns=COLUMNS, limit=2, cache_dir=str(tmp_path))
    assert rows == WANTED[:2]
    assert asked == [((HUB_NAME, "3.0.0"), {"split": "test", "cache_dir": str(tmp_path)})]


REFUSALS = {
    "missing": (lambda folder: folder / "none.jsonl", "does not exist; name a file, a folder"),
    "kind": (lambda folder: written(folder / "a.csv", "a,b"), "is of no known kind; use .parquet"),
    "no file": (lambda folder: folder, "cannot be read: .* doesn't contain any data files; "),
    "empty": (lambda folder: written(folder / "a.jsonl", ""), "cannot be read: it is empty; "),
    "no rows": (lambda folder: written(folder / "a.json", "[]"), "has no rows in its split"),
    "not JSON": (lambda folder: written(folder / "a.json", "nonsense"), "cannot be read: JSON "),
    "not UTF-8": (lambda folder: written(folder / "a.json", b'{"article": "\xff"}'), "cannot be"),
    "not Parquet": (
        lambda folder: written(folder / "a.parquet", "nonsense" * 9),
        "cannot be read: Parquet magic bytes",
    ),
    "column": (
        lambda folder: written(folder / "a.jsonl", lines([{"article": "a", "summary": "b"}])),
        "has no column 'highlights' in row 0, only article, summary; rename one or give other",
    ),
    "number": (
        lambda folder: written(folder / "a.jsonl", lines([{"article": "a", "highlights": 7}])),
        "'highlights' of row 0 is int, not text; correct the row or leave it out",
    ),
    "null": (
        lambda folder: written(
            folder / "a.jsonl", lines([*WANTED, {"article": "a", "highlights": None}])
        ),
        "'highlights' of row 5 is NoneType, not text",
    ),
    "split": (
        lambda folder: written(folder / "data" / "train.jsonl", lines(ROWS)).parent,
        "has no split 'test', only train; name the file to use instead of the folder",
    ),
}


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("case", REFUSALS)
def test_one_sentence_for_what_is_wrong(case, tmp_path, capfd):
    make, said = REFUSALS[case]
    path = make(tmp_path)
    with pytest.raises(UserError, match=said) as raised:
        load_rows(path, split="test", columns=COLUMNS, flag="--some_flag")
    message = str(raised.value)
    assert message.startswith(f"--some_flag {path}")
    assert "\n" not in message and ".;" not in message
    assert capfd.readouterr() == ("", "")


def test_configuration_must_be_known(tmp_path):
    names = "".join(
        f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("1.0.0", "2.0.0")
    )
    written(tmp_path / "README.md", f"---\nconfigs:\n{names}---\n")
    for name in ("1.0.0", "2.0.0"):
        written(tmp_path / f"{name}.jsonl", lines(ROWS))
    with pytest.raises(UserError, match="configurations 1.0.0, 2.0.0 and none named 3.0.0; name"):
        load_rows(tmp_path, split="test", columns=COLUMNS)


def test_calibration_takes_articles_of_the_training_split():
    train = load_rows(SAMPLE, split="train", columns=("article",))
    assert calibration_texts(SAMPLE, size=3) == [row["article"] for row in train[:3]]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "one\ntwo\n\n  three \n\n\n\nfour\n", ["one\ntwo", "three", "four"]),
        ("a.txt", "\ufeffone\n two\nthree", ["one", "two", "three"]),
        ("a.jsonl", lines([{"text": "one"}, {"text": "  "}, {"text": "two"}]), ["one", "two"]),
        ("a.jsonl", lines([{"text": "no", "article": "yes"}]), ["yes"]),
    ],
)
def test_calibration_texts_of_files(name, content, texts, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("utils.log.warning", said.append)
    path = written(tmp_path / name, content)
    assert calibration_texts(path, size=len(texts)) == texts
    assert said == []
    assert calibration_texts(path, size=1) == texts[:1]
    assert calibration_texts(path, size=512, flag="--calib") == texts
    assert said == [f"--calib {path} holds {len(texts)} texts, fewer than the 512 asked for"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", " \n\n ", "holds no text; give at least one"),
        ("a.txt", b"a\xffb", "cannot be read: byte 1 is not UTF-8"),
        ("a.jsonl", lines([{"body": "one"}]), "has no column 'article' in row 0, only body"),
        ("a.jsonl", lines([{"text": " "}]), "holds no text; give at least one"),
    ],
)
def test_calibration_refusals(name, content, said, tmp_path):
    path = written(tmp_path / name, content)
    with pytest.raises(UserError, match=f"^--dataset_path {path} {said}"):
        calibration_texts(path, size=2)
    with pytest.raises(UserError, match="No such file"):
        calibration_texts(tmp_path / "none.txt", size=2)
