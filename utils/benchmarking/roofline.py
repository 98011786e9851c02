"""A PNG of the device's roofline, and of decoding and prompts under it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.benchmarking.limits import Limits

SIZE, DOTS_PER_INCH = (7.0, 4.5), 120
# Operations per byte that the axis spans.
LEAST, MOST = 0.25, 8192.0


@dataclass(frozen=True)
class Point:
    """What ran: operations per byte, and operations per second."""

    name: str
    intensity: float
    flops_per_s: float


def points_of(records: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Two of each latency record: decoding, if it has any, and its prompts."""
    points = []
    for record in records:
        name = f"batch {record['bs']}, {record['isl']}/{record['osl']}"
        if record["gb_per_s"] is not None:
            intensity = record["decode_intensity"]
            speed = record["gb_per_s"] * 1e9 * intensity
            points.append(Point(f"decode, {name}", intensity, speed))
        speed = record["prefill_tflops"] * 1e12
        points.append(Point(f"prefill, {name}", record["prefill_intensity"], speed))
    return points


def draw_roofline(limits: Limits, points: Sequence[Point], path: Path) -> None:
    """Sloped: the measured bandwidth; level: the measured matrix products by type."""
    # The object interface needs no display and leaves matplotlib's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind, rate in limits.products.items():
        ridge = rate / limits.bandwidth
        [line] = axes.loglog([LEAST, ridge, MOST], [LEAST * limits.bandwidth, rate, rate], lw=1)
        axes.annotate(kind, (MOST, rate), ha="right", va="bottom", color=line.get_color())
    for point in points:
        axes.plot(point.intensity, point.flops_per_s, "o", label=point.name)
    axes.set_xlabel("operations per byte read")
    axes.set_ylabel("operations per second")
    axes.set_title(f"{limits.bandwidth / 1e9:,.0f} GB/s measured", fontsize="medium")
    axes.grid(True, which="major", alpha=0.3)
    if points:
        axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=DOTS_PER_INCH)
