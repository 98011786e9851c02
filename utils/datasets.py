"""Texts to evaluate and to calibrate with: CNN/DailyMail, or files and folders of the user's.

Local data is streamed, so nothing is written beside it or into a cache. The hub is asked only for
the default data set, only when no cache has it, and with one short question first, because
`datasets` by itself waits long for a dead network. With several ranks, call it on one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engine import env
from engine.errors import UserError
from utils import log
from utils.hub import HUB_TIMEOUT

HUB_NAME, CONFIG = "abisee/cnn_dailymail", "3.0.0"
FILE_KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
# Columns that can hold the text of a calibration set; the first that exists is read.
TEXT_COLUMNS = ("article", "text")
# What Dataset.save_to_disk and DatasetDict.save_to_disk leave in a folder.
_SAVED_MARKS = ("state.json", "dataset_dict.json")

Row = Mapping[str, Any]


def load_rows(
    path: str | Path | None,
    *,
    split: str,
    columns: Sequence[str],
    limit: int | None = None,
    cache_dir: str | None = None,
    flag: str = "--dataset_path",
) -> list[dict[str, str]]:
    """The texts in `columns` of the first `limit` rows of a data set.

    `path` is a .parquet, .json or .jsonl file, which is one split by itself, a folder that
    `load_dataset` or `load_from_disk` reads, or a folder that is a cache of CNN/DailyMail. None is
    CNN/DailyMail 3.0.0 from `cache_dir` (default: that of `datasets`) or from the hub. UserError
    naming `flag` for data that is missing, empty, unreadable, or without a column or the split.
    """
    where = _describe(path, flag)
    with _reading(where):
        rows = list(islice(_open(path, split, cache_dir, where, flag), limit))
    if not rows:
        raise UserError(f"{where} has no rows in its split '{split}'; give at least one")
    for column in columns:
        _check_column(rows, column, where)
    return [{column: row[column] for column in columns} for row in rows]


def calibration_texts(
    source: str | Path | None,
    *,
    size: int,
    cache_dir: str | None = None,
    flag: str = "--dataset_path",
) -> list[str]:
    """At most `size` texts to calibrate with; a warning says if there are fewer.

    `source` is a .txt file, of which each paragraph is a text (each line, if it has no blank
    ones), or anything that `load_rows` takes, with a column of TEXT_COLUMNS; of its splits the
    training one is read. None: articles of CNN/DailyMail.
    """
    assert size > 0
    where = _describe(source, flag)
    if source is not None and Path(source).suffix == ".txt":
        texts = read_paragraphs(source, flag)
    else:
        with _reading(where):
            rows = _open(source, "train", cache_dir, where, flag)
            texts = list(islice(_texts(rows, where), size))
    if not texts:
        raise UserError(f"{where} holds no text; give at least one")
    if len(texts) < size:
        log.warning(f"{where} holds {len(texts)} texts, fewer than the {size} asked for")
    return texts[:size]


def read_paragraphs(path: str | Path, flag: str) -> list[str]:
    """Blocks between blank lines of a UTF-8 file; its lines, if there is no blank one."""
    try:
        content = Path(path).read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise _unreadable(f"{flag} {path}", error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise _unreadable(f"{flag} {path}", f"byte {error.start} is not UTF-8") from None
    separator = "\n\n" if "\n\n" in content else "\n"
    return [block.strip() for block in content.split(separator) if block.strip()]


def _texts(rows: Iterable[Row], where: str) -> Iterator[str]:
    """The texts of `rows`, blank ones left out."""
    for number, row in enumerate(rows):
        column = next((name for name in TEXT_COLUMNS if name in row), TEXT_COLUMNS[0])
        _check_column([row], column, where, first=number)
        if row[column].strip():
            yield row[column]


def _check_column(rows: Sequence[Row], column: str, where: str, first: int = 0) -> None:
    for number, row in enumerate(rows, start=first):
        if column not in row:
            raise UserError(
                f"{where} has no column '{column}' in row {number}, only "
                f"{', '.join(sorted(row)) or 'none'}; rename one or give other data"
            )
        if not isinstance(row[column], str):
            raise UserError(
                f"{where}: '{column}' of row {number} is {type(row[column]).__name__}, not text; "
                "correct the row or leave it out"
            )


def _describe(path: str | Path | None, flag: str) -> str:
    return f"the data set {HUB_NAME}" if path is None else f"{flag} {path}"


def _unreadable(where: str, reason: str) -> UserError:
    return UserError(f"{where} cannot be read: {reason}; correct it or name other data")


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn what `datasets` raises for damaged or absent data into a UserError."""
    from datasets import logging
    from datasets.exceptions import DatasetsError

    # What it would log is what it raises as well.
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except StopIteration:  # its way to say that a JSON file is empty
        raise _unreadable(where, "it is empty") from None
    except (OSError, ValueError, DatasetsError) as error:
        # A generation error only wraps the one that says what is wrong.
        cause = error.__cause__ or error
        lines = str(cause).strip().splitlines()
        reason = lines[0].rstrip(".") if lines else type(cause).__name__
        raise _unreadable(where, reason) from None


def _open(
    path: str | Path | None, split: str, cache_dir: str | None, where: str, flag: str
) -> Iterable[Row]:
    if path is None:
        return _open_default(split, cache_dir, flag)
    path = Path(path)
    if path.is_file():
        return _open_file(path, where)
    if not path.is_dir():
        raise UserError(f"{where} does not exist; name a file, a folder or leave it out")
    if _is_cache(path):
        return _load_cached(split, path)
    return _choose_split(_open_folder(path, where), split, where)


def _open_file(path: Path, where: str) -> Iterable[Row]:
    if path.suffix not in FILE_KINDS:
        raise UserError(
            f"{where} is of no known kind; use {', '.join(FILE_KINDS)} or a folder of such files"
        )
    kind = FILE_KINDS[path.suffix]
    return _stream(kind, data_files=str(path), split="train")


def _open_folder(path: Path, where: str) -> Mapping[str, Iterable[Row]]:
    from datasets import Dataset, get_dataset_config_names, load_from_disk

    if any((path / name).is_file() for name in _SAVED_MARKS):
        saved = load_from_disk(str(path))
        return {str(saved.split or "train"): saved} if isinstance(saved, Dataset) else saved
    names = get_dataset_config_names(str(path))
    if CONFIG not in names and len(names) > 1:
        raise UserError(
            f"{where} has the configurations {', '.join(names)} and none named {CONFIG}; name "
            "one's files instead of the folder"
        )
    name = CONFIG if CONFIG in names else names[0]
    return _stream(str(path), name)


def _stream(*names: str, **options: Any) -> Any:
    """`load_dataset` that stores nothing. It still wants a place for a lock while it opens."""
    from datasets import load_dataset

    with TemporaryDirectory() as scratch:
        return load_dataset(*names, streaming=True, cache_dir=scratch, **options)


def _choose_split(splits: Mapping[str, Iterable[Row]], split: str, where: str) -> Iterable[Row]:
    if split not in splits:
        raise UserError(
            f"{where} has no split '{split}', only {', '.join(splits)}; name the file to use "
            "instead of the folder"
        )
    return splits[split]


def _open_default(split: str, cache_dir: str | None, flag: str) -> Iterable[Row]:
    from datasets import config, load_dataset

    folder = Path(cache_dir or config.HF_DATASETS_CACHE).expanduser()
    if _is_cache(folder):
        return _load_cached(split, folder)
    reason = "HF_HUB_OFFLINE is set" if env.hub_offline() else _why_unreachable()
    if reason is not None:
        raise UserError(
            f"the data set {HUB_NAME} is not in the cache {folder} and {reason}; name local data "
            f"with {flag}, for instance tests/data/cnn_dailymail"
        )
    log.info(f"fetching {HUB_NAME} from the Hugging Face hub into {folder}")
    return load_dataset(HUB_NAME, CONFIG, split=split, cache_dir=str(folder))


def _is_cache(folder: Path) -> bool:
    return _cached_folder(folder).is_dir()


def _cached_folder(cache_dir: Path) -> Path:
    return cache_dir / HUB_NAME.replace("/", "___") / CONFIG


def _load_cached(split: str, cache_dir: Path) -> Iterable[Row]:
    """The Arrow files that an earlier fetch left, without a question to the hub."""
    files = list(_cached_folder(cache_dir).glob(f"*/*/*-{split}*.arrow"))
    if not files:
        raise FileNotFoundError(f"{_cached_folder(cache_dir)} has no split '{split}'")
    newest = max(files, key=lambda file: file.stat().st_mtime).parent
    shards = sorted(str(file) for file in files if file.parent == newest)
    return _stream("arrow", data_files=shards, split="train")


def _why_unreachable() -> str | None:
    """Why the hub cannot give the default data set; None if it can."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        HfApi().dataset_info(HUB_NAME, timeout=HUB_TIMEOUT)
    except (HTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"the Hugging Face hub cannot be used ({reason})"
    return None
