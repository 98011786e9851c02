"""What is said on stderr at which level, by which rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from engine.errors import UserError
from utils import log


@pytest.fixture(autouse=True)
def own_logger() -> Iterator[None]:
    logger, lines = log.logger, log._lines
    before = logger.level, logger.propagate, list(logger.handlers), lines.rank
    yield
    logger.level, logger.propagate, logger.handlers, lines.rank = before
    logger.manager._clear_cache()


@pytest.mark.parametrize(
    ("level", "rank", "heard"),
    [
        ("internal_error", 0, []),
        ("error", 0, ["[yi] ERROR e"]),
        ("warning", 0, ["[yi] ERROR e", "[yi] WARNING w 100%"]),
        ("info", 0, ["[yi] ERROR e", "[yi] WARNING w 100%", "[yi] INFO i"]),
        ("verbose", 0, ["[yi] ERROR e", "[yi] WARNING w 100%", "[yi] INFO i", "[yi] DEBUG d"]),
        ("debug", 0, ["[yi] ERROR e", "[yi] WARNING w 100%", "[yi] INFO i", "[yi] DEBUG d"]),
        ("debug", 2, ["[yi] rank 2 ERROR e", "[yi] rank 2 WARNING w 100%"]),
        ("error", 2, ["[yi] rank 2 ERROR e"]),
    ],
)
def test_levels(
    capsys: pytest.CaptureFixture[str], level: str, rank: int, heard: list[str]
) -> None:
    log.setup(level, rank)
    # A second call replaces the first.
    log.setup(level, rank)
    log.error("e")
    log.warning("w 100%")
    log.info("i")
    log.debug("d")
    logging.getLogger("another.package").error("none of ours")
    assert capsys.readouterr().err.splitlines() == heard


def test_parts_of_the_engine_speak_through_the_same_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.setup("info", 0)
    logging.getLogger("yi.comm").info("%d ranks", 4)
    assert capsys.readouterr().err == "[yi] INFO 4 ranks\n"


def test_rank_is_the_launchers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    log.setup("info")
    log.warning("w")
    log.warn_loudly("not from here")
    assert capsys.readouterr().err == "[yi] rank 3 WARNING w\n"


def test_unknown_level() -> None:
    with pytest.raises(UserError, match="--log_level 'loud' is unknown; choose one of .*verbose"):
        log.setup("loud")


def test_loud_warnings_stand_in_a_box(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("internal_error", 0)
    log.warn_loudly("dummy weights " * 12)
    lines = capsys.readouterr().err.splitlines()
    assert {len(line) for line in lines} == {log.BOX_WIDTH}
    assert set(lines[0]) == set(lines[-1]) == {"#"}
    assert lines[1].startswith("# WARNING ")
    assert " ".join(lines[2:-1]).count("dummy") == 12


@pytest.mark.parametrize(("is_terminal", "rank"), [(True, 0), (True, 1), (False, 0)])
def test_progress_is_shown_to_who_watches_rank_0(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,
    rank: int,
) -> None:
    log.setup("info", rank)
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    assert list(log.progress(iter("abc"), "reading", total=3)) == ["a", "b", "c"]
    with log.ProgressBar("writing", unit="B") as bar:
        bar.update_to(3, 10)
        bar.update_to(10, 10)
    shown = capsys.readouterr().err
    assert ("reading: 100%" in shown) == ("writing: 100%" in shown) == (is_terminal and rank == 0)
    assert bool(shown) == (is_terminal and rank == 0)
