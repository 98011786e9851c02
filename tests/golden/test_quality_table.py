"""The README's table of qualities is what the engines have now, and within the bounds of each
kind of mode."""

from __future__ import annotations

import re

import pytest

from benchmarks.marks import read_between
from benchmarks.quality import BASELINE, EXACT, MARK, MODES, Quality, Workshop, measure
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

# Calibration and sums in another order move a mode's perplexity by less than this, per cent.
TOLERANCE = 0.5
# Start of a mode's name → how much perplexity it may lose against BF16, per cent.
BOUNDS = {
    "FP32": 0.1,
    "FP16": 0.1,
    "BF16": 0.0,
    "INT8 weight-only": 1.0,
    "INT4 weight-only": 8.0,
    "SmoothQuant per tensor": 3.0,
    "SmoothQuant per channel": 3.0,
    "SmoothQuant per token": 1.0,
    "INT4 AWQ": 8.0,
    "INT4 GPTQ": 8.0,
    "FP8": 1.0,
    "INT8 KV": 0.5,
}


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    """Mode → the cells of its row."""
    between = read_between(ROOT / "README.md", MARK)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in between.splitlines()]
    return {name: cells for name, *cells in rows[2:]}


@pytest.fixture(scope="module")
def exact(workshop: Workshop) -> Quality:
    return measure(workshop.build(EXACT))


def number(cell: str) -> float:
    return float(re.match(r"[+-]?[\d.]+", cell)[0])


def test_every_mode_has_a_row(table):
    assert list(table) == list(MODES)


@pytest.mark.parametrize("name", MODES)
def test_row(name, table, workshop, exact):
    size, perplexity, change, same = table[name]
    found = exact if name == EXACT else measure(workshop.build(name))
    assert found.bytes / 1e6 == pytest.approx(number(size), rel=0.02)
    assert found.perplexity == pytest.approx(number(perplexity), rel=TOLERANCE / 100)
    if name != EXACT:
        assert 100 * found.agreement(exact) == pytest.approx(number(same), abs=1.0)
    if name != BASELINE:
        bound = next(bound for start, bound in BOUNDS.items() if name.startswith(start))
        assert number(change) <= bound


def test_grouped_scales_beat_one_per_channel(table):
    plain = number(table["INT4 weight-only"][1])
    assert number(table["INT4 AWQ, groups of 128"][1]) < plain
    assert number(table["INT4 GPTQ, groups of 128"][1]) < plain
