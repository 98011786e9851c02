"""Tables that stand in a Markdown file between marks, so that a program can write them anew."""

from __future__ import annotations

from pathlib import Path


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def read_between(path: Path, name: str) -> str:
    return _cut(path, name)[1].strip("\n")


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of that name."""
    before, _, after = _cut(path, name)
    begin, end = marks(name)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def _cut(path: Path, name: str) -> tuple[str, str, str]:
    begin, end = marks(name)
    before, _, rest = path.read_text().partition(begin)
    between, found, after = rest.partition(end)
    assert found, f"{path} has no marks {begin} … {end}"
    return before, between, after
