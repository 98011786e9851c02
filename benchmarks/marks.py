"""Tables that stand in a Markdown file between marks, so that a program can write them anew."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError


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
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a Markdown file") from None
    before, _, rest = text.partition(begin)
    between, found, after = rest.partition(end)
    if not found:
        raise UserError(f"{path} has no lines '{begin}' and '{end}'; put them where the table goes")
    return before, between, after
