"""From benchmark.py's flags to a BenchmarkPlan. Every refusal that needs no engine is made here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from utils.benchmarking.dummy import DummyEngine
from utils.benchmarking.workload import Workload, parse_lengths, parse_workloads

MODES = ("latency", "throughput", "limits", "kernels")
# Flags that not every mode has a use for, with the modes that do; all are None unless given.
BELONGS = {
    "engine_dir": ("latency", "throughput"),
    "dummy": ("latency", "throughput"),
    "batch_size": ("latency", "throughput"),
    "input_output_len": ("latency", "throughput"),
    "workload": ("latency", "throughput"),
    "repeats": ("latency", "throughput"),
    "json": ("latency", "throughput"),
    "num_requests": ("throughput",),
    "plot": ("latency", "limits"),
}
_ITS_OWN = "a workload has a batch size and lengths of its own"
CLASHES = (
    ("dummy", "engine_dir", "one engine is measured"),
    ("workload", "batch_size", _ITS_OWN),
    ("workload", "input_output_len", _ITS_OWN),
)
SHAPING = ("layers", "quant", "kv", "dtype", "quantize_lm_head")
DUMMY_ONLY = (*SHAPING, "work_dir")
DEFAULT_ENGINE_DIR = "engine_outputs"
DEFAULT_LENGTHS = ("128,128",)
DEFAULT_REPEATS, DEFAULT_REQUESTS, DEFAULT_BATCH = 3, 64, 8


@dataclass(frozen=True)
class BenchmarkPlan:
    """What one call of benchmark.py is to do.

    Workloads are `given`, or else every batch size with every pair of lengths; no batch size is the
    engine's own limit. `json_file` is '' for the device's file in benchmarks/results.
    """

    mode: str
    engine_dir: str
    dummy: DummyEngine | None
    device: str | None
    tuning: bool
    may_share_gpu: bool
    given: tuple[Workload, ...]
    batches: tuple[int, ...]
    lengths: tuple[tuple[int, int], ...]
    repeats: int
    requests: int
    work_dir: str | None
    plot: str | None
    json_file: str | None

    def works(self, max_batch_size: int) -> tuple[Workload, ...]:
        batches = self.batches or (max_batch_size,)
        return self.given or tuple(
            Workload(batch, *pair) for batch in batches for pair in self.lengths
        )


def plan_benchmark(flags: Mapping[str, Any]) -> BenchmarkPlan:
    """UserError for flags that contradict each other or the mode."""
    mode = flags["mode"]
    _refuse(flags)
    dummy = None
    if flags["dummy"] is not None:
        given = {name: flags[name] for name in SHAPING if flags[name]}
        dummy = DummyEngine(flags["dummy"], **given)
    batches = tuple(flags["batch_size"] or ((1,) if mode == "latency" else ()))
    return BenchmarkPlan(
        mode=mode,
        engine_dir=flags["engine_dir"] or DEFAULT_ENGINE_DIR,
        dummy=dummy,
        device=None if flags["device"] == "auto" else flags["device"],
        tuning=not flags["no_tuning"],
        may_share_gpu=flags["oversubscribe_gpu"],
        given=parse_workloads(flags["workload"] or ()),
        batches=batches,
        lengths=parse_lengths(flags["input_output_len"] or DEFAULT_LENGTHS),
        repeats=flags["repeats"] or DEFAULT_REPEATS,
        requests=flags["num_requests"] or DEFAULT_REQUESTS,
        work_dir=flags["work_dir"],
        plot=flags["plot"],
        json_file=flags["json"],
    )


def _refuse(flags: Mapping[str, Any]) -> None:
    mode = flags["mode"]
    for name, modes in BELONGS.items():
        if flags[name] is not None and mode not in modes:
            raise UserError(
                f"--{name} has no meaning for '{mode}', it belongs to {' and '.join(modes)}; leave "
                "it out"
            )
    for one, other, why in CLASHES:
        if flags[one] is not None and flags[other] is not None:
            raise UserError(f"--{one} and --{other} cannot be combined: {why}; leave one out")
    for name in DUMMY_ONLY:
        if flags[name] is not None and flags["dummy"] is None:
            raise UserError(
                f"--{name} belongs to --dummy, which builds an engine; add that flag or leave this "
                "one out"
            )
    work_dir = flags["work_dir"]
    if work_dir is not None and not Path(work_dir).is_dir():
        raise UserError(f"--work_dir {work_dir} is no directory; name one that is there")
