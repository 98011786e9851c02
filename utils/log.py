"""What the scripts tell their user while they work: log lines, progress and warnings, on stderr."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Iterable
from typing import Any, TypeVar

from engine import env
from engine.errors import UserError

# TensorRT-LLM's names. It has nothing below verbose, and debug means the same.
LEVELS = {
    "internal_error": logging.CRITICAL,
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "verbose": logging.DEBUG,
    "debug": logging.DEBUG,
}
BOX_WIDTH = 78

T = TypeVar("T")

logger = logging.getLogger("yi")
debug = logger.debug
info = logger.info
warning = logger.warning
error = logger.error


class _Lines(logging.Handler):
    """Prints `[yi] INFO message`; ranks other than 0 name themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = 0

    def emit(self, record: logging.LogRecord) -> None:
        rank = f" rank {self.rank}" if self.rank else ""
        # stderr is looked up at every line, since a test or a progress bar may have replaced it.
        print(f"[yi]{rank} {record.levelname} {self.format(record)}", file=sys.stderr)


_lines = _Lines()


def setup(level: str, rank: int | None = None) -> None:
    """Log at `level`, one of LEVELS; ranks other than 0 log warnings and worse only.

    `rank` is the launcher's unless given.
    """
    if level not in LEVELS:
        raise UserError(f"--log_level '{level}' is unknown; choose one of {', '.join(LEVELS)}")
    _lines.rank = env.rank() if rank is None else rank
    least = logging.WARNING if _lines.rank else logging.NOTSET
    logger.setLevel(max(LEVELS[level], least))
    logger.propagate = False
    if _lines not in logger.handlers:
        logger.addHandler(_lines)


def warn_loudly(text: str) -> None:
    """A boxed warning on rank 0, printed whatever the log level is."""
    if _lines.rank:
        return
    edge = "#" * BOX_WIDTH
    inner = BOX_WIDTH - 4
    lines = ["WARNING", *textwrap.wrap(text, inner)]
    print(edge, *(f"# {line:<{inner}} #" for line in lines), edge, sep="\n", file=sys.stderr)


def progress(items: Iterable[T], desc: str, total: int | None = None) -> Iterable[T]:
    """`items`, with a progress bar while they are taken, if someone watches."""
    return _bar(iterable=items, desc=desc, total=total)


class ProgressBar:
    """A progress bar for work that reports (done, total) itself, if someone watches."""

    def __init__(self, desc: str, unit: str = "it"):
        self._bar = _bar(desc=desc, unit=unit, unit_scale=True)

    def update_to(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def note(self, text: str) -> None:
        """Show `text` beside the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


def is_watched() -> bool:
    """Whether someone at a terminal sees this process's progress."""
    return sys.stderr.isatty() and _lines.rank == 0


def _bar(**settings: Any) -> Any:
    from tqdm import tqdm

    return tqdm(file=sys.stderr, disable=not is_watched(), **settings)
