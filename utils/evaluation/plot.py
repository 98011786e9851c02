"""A bar chart of several engines and transformers side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.evaluation.task import Outcome

WIDTH, HEIGHT_OF_BAR, HEIGHT_OF_FRAME = 4.0, 0.35, 1.2
DOTS_PER_INCH = 120
REFERENCE_COLOUR, ENGINE_COLOUR = "0.6", "tab:blue"

# Title of a panel and its value; None where a side was not measured.
Panel = tuple[str, Callable[[Outcome], float | None]]


def _rouge1(outcome: Outcome) -> float | None:
    scores = [scores["rouge1"] for scores in outcome.scores]
    return statistics.fmean(scores) if scores else None


def _perplexity(outcome: Outcome) -> float | None:
    return outcome.likelihood.perplexity if outcome.likelihood else None


def _speed(outcome: Outcome) -> float | None:
    return outcome.speed.tokens_per_second if outcome.speed else None


PANELS: tuple[Panel, ...] = (
    ("ROUGE-1 (higher is better)", _rouge1),
    ("perplexity (lower is better)", _perplexity),
    ("tokens per second", _speed),
)


def draw_comparison(outcomes: Sequence[Outcome], path: Path) -> None:
    """A PNG with a panel for each figure that was measured and a bar for each side."""
    # The object interface needs no display and leaves matplotlib's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(panel[1](o) is not None for o in outcomes)]
    size = (WIDTH * len(panels) + 1, HEIGHT_OF_BAR * len(outcomes) + HEIGHT_OF_FRAME)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    places = list(range(len(outcomes)))
    colours = [REFERENCE_COLOUR if o.is_reference else ENGINE_COLOUR for o in outcomes]
    every_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, value) in zip(every_axes, panels, strict=True):
        bars = axes.barh(places, [value(o) or 0.0 for o in outcomes], color=colours)
        axes.bar_label(bars, fmt="%.4g", padding=2)
        axes.margins(x=0.18)
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    every_axes[0].set_yticks(places, [o.name for o in outcomes])
    every_axes[0].invert_yaxis()
    figure.savefig(path, dpi=DOTS_PER_INCH)
