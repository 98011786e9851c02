#!/usr/bin/env python3
"""Measure an engine against what the device can do, in the same run: python benchmark.py MODE, or
mpirun -n WORLD python benchmark.py MODE for an engine of several ranks.

latency: static batches, time to first token and decode rate. throughput: many requests, batch
after batch. limits: memory bandwidth and matrix products alone. kernels: the operations one by
one. Prompts are random token ids, decoding is greedy and no token ends an output. The last line of
the output is one JSON document.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import build
from engine.errors import UserError
from utils import log
from utils.benchmarking.dummy import DTYPES, KV_FLAGS, PRESETS, QUANT_FLAGS, DummyEngine
from utils.benchmarking.plan import DEFAULT_BATCH, MODES, BenchmarkPlan, plan_benchmark
from utils.cli import Parser, add_gpu_flags, positive_int, run_main

if TYPE_CHECKING:
    import torch

    from engine.comm import World
    from utils.benchmarking.run import Device
    from utils.benchmarking.workload import Workload

ROOT = Path(__file__).resolve().parent
KERNEL_BENCHMARKS = {
    "cpu": ("benchmarks.cpu_linear", "benchmarks.cpu_attention"),
    "cuda": ("benchmarks.kernels", "benchmarks.attention_kernels"),
}


def make_parser() -> Parser:
    parser = Parser(prog="benchmark.py", description=__doc__)
    parser.add_argument("mode", choices=MODES, help="what to measure")
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine_dir", metavar="DIR", help="what build.py wrote (default: engine_outputs)"
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any"
    )
    add_gpu_flags(group)
    group.add_argument(
        "--dummy",
        choices=tuple(PRESETS),
        help="build an engine of this shape with random weights, measure it and delete it; under "
        "mpirun it is cut tensor-parallel among the ranks",
    )
    group.add_argument("--layers", type=positive_int, help="with --dummy: only so many layers")
    group.add_argument("--quant", choices=tuple(QUANT_FLAGS), help="with --dummy (default: none)")
    group.add_argument(
        "--kv", choices=tuple(KV_FLAGS), help="with --dummy: type of the KV cache (default: none)"
    )
    group.add_argument("--dtype", choices=DTYPES, help="with --dummy (default: bfloat16)")
    group.add_argument(
        "--quantize_lm_head",
        action="store_true",
        default=None,
        help="with --dummy: an INT8 output head (default: one of --dtype)",
    )
    group.add_argument(
        "--work_dir", metavar="DIR", help="with --dummy: where to build, for example /dev/shm"
    )
    _add_work_flags(parser)
    return parser


def _add_work_flags(parser: Parser) -> None:
    group = parser.add_argument_group("work and report")
    group.add_argument(
        "--batch_size",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="sequences of a static batch (default: 1; throughput: the engine's --max_batch_size)",
    )
    group.add_argument(
        "--input_output_len",
        nargs="+",
        metavar="IN,OUT",
        help="tokens of a prompt and new tokens; every pair is measured with every batch size "
        "(default: 128,128)",
    )
    group.add_argument(
        "--workload",
        nargs="+",
        metavar="N,IN,OUT",
        help="batch size and lengths together, in place of these two flags",
    )
    group.add_argument(
        "--num_requests", type=positive_int, help="of throughput, all at once (default: 64)"
    )
    group.add_argument(
        "--repeats", type=positive_int, help="timed runs, of which the median counts (default: 3)"
    )
    group.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="",
        help="append a record for each workload (default: the device's in benchmarks/results)",
    )
    group.add_argument("--plot", metavar="FILE", help="draw a roofline as a PNG")
    group.add_argument(
        "--log_level",
        default="warning",
        help="error, warning, info, verbose or debug (default: %(default)s)",
    )


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    log.setup(args.log_level)
    plan = plan_benchmark(vars(args))
    # These import torch, which --help and mistaken flags do without.
    from engine.comm import open_world
    from utils.benchmarking.machine import command

    world = open_world()
    if plan.mode == "kernels":
        from engine.backends.torch_engine import pick_device

        return _run_kernels(pick_device(plan.device, world)) if world.rank == 0 else 0
    from utils.benchmarking.run import open_device

    device = open_device(plan.device, world, may_share_gpu=plan.may_share_gpu)
    records = []
    if plan.mode != "limits":
        records = _measure(plan, world, device, command("benchmark.py", argv))
    if world.rank == 0:
        _report(plan, device, records)
    return 0


def _run_kernels(device: torch.device) -> int:
    """The programs that measure the device's kernels, one after the other; the first that fails
    ends it with its status."""
    from utils.benchmarking.machine import device_name, versions

    found = {}
    for name in KERNEL_BENCHMARKS[device.type]:
        print(f"# {name}", flush=True)
        status, found[name] = _run_module(name)
        if status:
            return status
    whole = {"mode": "kernels", "device": device_name(device), "versions": versions(device)}
    print(json.dumps({**whole, "kernels": found}, ensure_ascii=False))
    return 0


def _run_module(name: str) -> tuple[int, Any]:
    """Its status, and the JSON document that it may have for a last line."""
    last = ""
    command = [sys.executable, "-m", name]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for last in child.stdout:
            print(last, end="", flush=True)
    with suppress(ValueError):
        return child.returncode, json.loads(last)
    return child.returncode, None


def _measure(plan: BenchmarkPlan, world: World, device: Device, command: str) -> list[dict]:
    """The record of each workload, written as soon as it is there."""
    from utils.benchmarking import report
    from utils.benchmarking.run import open_run

    records = []
    with (
        _engine(plan, world) as (engine_dir, build_s),
        open_run(engine_dir, world, device, tuning=plan.tuning) as run,
    ):
        for work in plan.works(run.record.limits.max_batch_size):
            if plan.mode == "latency":
                figures = run.latency(work, repeats=plan.repeats)
            else:
                figures = run.throughput(work, requests=plan.requests, repeats=plan.repeats)
            figures |= {"build_s": build_s, "repeats": plan.repeats}
            records.append(
                report.make_record(
                    plan.mode, run.record, work, figures, device=device, command=command
                )
            )
            if world.rank == 0 and plan.json_file is not None:
                path = report.results_file(plan.json_file, records[-1])
                report.append_record(path, records[-1])
    return records


@contextmanager
def _engine(plan: BenchmarkPlan, world: World) -> Iterator[tuple[str, float | None]]:
    """The engine directory, and the seconds that building it took if it is a dummy one."""
    if plan.dummy is None:
        yield plan.engine_dir, None
        return
    works = plan.works(DEFAULT_BATCH)
    with dummy_engine(plan.dummy, works, world=world, work_dir=plan.work_dir) as made:
        yield made


@contextmanager
def dummy_engine(
    dummy: DummyEngine, works: Sequence[Workload], *, world: World, work_dir: str | None
) -> Iterator[tuple[str, float]]:
    """An engine that all of `works` fit, cut tensor-parallel among the ranks of one host, and the
    seconds that building it took; deleted at the end."""
    with _work_folder(work_dir) as own:
        folder, seconds = world.bcast(own), 0.0
        if world.rank == 0:
            flags = dummy.build_flags(works, tp=world.size, output_dir=folder)
            start = time.perf_counter()
            with redirect_stdout(sys.stderr):
                build.main([*flags, "--log_level", "warning"])
            seconds = time.perf_counter() - start
        world.rest()
        yield folder, world.bcast(seconds)
        # No rank deletes what another still reads.
        world.rest()


def _work_folder(work_dir: str | None) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="yi-dummy-", dir=work_dir)
    except OSError as error:
        raise UserError(
            f"--work_dir {work_dir or tempfile.gettempdir()} cannot be written "
            f"({error.strerror}); name a directory that exists and has room for an engine"
        ) from None


def _report(plan: BenchmarkPlan, device: Device, records: list[dict]) -> None:
    from utils.benchmarking import report
    from utils.benchmarking.roofline import draw_roofline, points_of

    print(report.limits_table(device.limits))
    if records:
        show = report.latency_table if plan.mode == "latency" else report.throughput_table
        print(f"\n{show(records)}")
    if plan.plot is not None:
        draw_roofline(device.limits, points_of(records), Path(plan.plot))
        print(f"\nroofline: {plan.plot}")
    whole = {"mode": plan.mode, **report.describe_machine(device), "records": records}
    print(json.dumps(whole, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(run_main(main))
