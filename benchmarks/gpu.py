"""All figures of a GPU in a few minutes, the important ones first.

    python -m benchmarks.gpu --minutes 6 --out DIR [--layers 8]

Every step is a process of its own with a time limit; what a step that failed has left out is tried
once more, each workload alone. After each step DIR holds results.json (the records of benchmark.py
and peers.py), report.md and steps.json (what ran, how long, and the last words of what failed).
Models are cut to --layers layers, as their records say: a decode step of 8 layers reads a quarter
of the whole one's weights and shows the same share of the bandwidth, while the head and what a
step costs once weigh more. Whole models come last, if there is time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers import peers_table
from engine.errors import UserError
from utils.benchmarking import report
from utils.benchmarking.limits import Limits
from utils.cli import Parser, positive_float, positive_int, run_main

ROOT = Path(__file__).resolve().parent.parent
RAM_DISK = Path("/dev/shm")
# Room that the RAM disk must have for an engine to be built there.
RAM_DISK_BYTES = 16e9
DECODE, BATCH, PREFILL = "1,1024,128", "64,128,128", "8,2048,1"
# With less time than this a step is not begun.
LEAST_SECONDS = 20.0
LAST_LINES = 12
SECONDS_TO_END = 5


@dataclass(frozen=True)
class Step:
    """`works` of one engine in one process, or with `peers` beside other engines; without a preset
    the limits alone. `is_whole` keeps all layers."""

    name: str
    preset: str | None = None
    quant: str = "none"
    works: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    is_whole: bool = False
    seconds: float = 90.0

    def command(
        self, *, layers: int, device: str, work_dir: str, results: Path, tuning: bool = True
    ) -> list[str]:
        if self.preset is None:
            return ["benchmark.py", "limits", "--device", device]
        cut = [] if self.is_whole else ["--layers", str(layers)]
        own = ["--quant", self.quant, "--device", device, "--work_dir", work_dir, *cut]
        own += ["--json", str(results)]
        if not self.peers:
            return [
                "benchmark.py",
                "latency",
                "--dummy",
                self.preset,
                *own,
                *([] if tuning else ["--no_tuning"]),
                "--workload",
                *self.works,
            ]
        [work] = self.works
        batch, _, lengths = work.partition(",")
        own += ["--batch_size", batch, "--input_output_len", lengths, "--rounds", "3"]
        return ["-m", "benchmarks.peers", "--preset", self.preset, *own, "--peers", *self.peers]


PEERS = ("transformers", "vllm")
STEPS = (
    Step("limits", seconds=60),
    Step("6b bf16", "yi-6b", works=(DECODE, BATCH, PREFILL)),
    Step("6b int8", "yi-6b", "int8", (DECODE,)),
    Step("6b awq", "yi-6b", "int4_awq", (DECODE,)),
    Step("6b fp8", "yi-6b", "fp8", (DECODE, PREFILL)),
    Step("6b peers, batch 64", "yi-6b", works=(BATCH,), peers=PEERS, seconds=240),
    Step("6b peers, batch 1", "yi-6b", works=(DECODE,), peers=PEERS, seconds=240),
    Step("34b bf16", "yi-34b", works=(DECODE, PREFILL)),
    Step("34b int8", "yi-34b", "int8", (DECODE,)),
    Step("34b awq", "yi-34b", "int4_awq", (DECODE,)),
    Step("34b fp8", "yi-34b", "fp8", (DECODE, PREFILL)),
    Step("6b sq", "yi-6b", "sq", (DECODE, PREFILL)),
    Step("6b int4", "yi-6b", "int4", (DECODE,)),
    Step("6b bf16, whole", "yi-6b", works=(DECODE, BATCH), is_whole=True, seconds=180),
    Step("6b awq, whole", "yi-6b", "int4_awq", (DECODE,), is_whole=True, seconds=180),
    Step("6b int8, whole", "yi-6b", "int8", (DECODE,), is_whole=True, seconds=180),
    Step("6b fp8, whole", "yi-6b", "fp8", (DECODE, PREFILL), is_whole=True, seconds=180),
)


@dataclass(frozen=True)
class Done:
    """`status` 'ok', 'failed' or 'too slow'; `words` is the end of what it said."""

    name: str
    status: str
    seconds: float
    command: str
    words: str = ""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="gpu.py", description="all figures of a GPU in a few minutes")
    parser.add_argument("--minutes", type=positive_float, default=6.0)
    parser.add_argument("--out", metavar="DIR", required=True)
    parser.add_argument("--layers", type=positive_int, default=8, help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: rehearse")
    parser.add_argument(
        "--no_tuning", action="store_true", help="kernels by rule: saves half a minute an engine"
    )
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS])
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    steps = [step for step in STEPS if args.steps is None or step.name in args.steps]
    session = GpuSession(
        Path(args.out), args.layers, args.device, choose_work_dir(), tuning=not args.no_tuning
    )
    for done in session.run(steps, end):
        print(f"{done.status:8} {done.seconds:6.1f} s  {done.name}", flush=True)
    print(session.markdown())
    return 0


class GpuSession:
    """Steps one after the other, and what they have found so far."""

    def __init__(self, out: Path, layers: int, device: str, work_dir: str, *, tuning: bool = True):
        self._out, self._work_dir = out, work_dir
        self._layers, self._device, self._tuning = layers, device, tuning
        self._results = out.resolve() / "results.json"
        self._done: list[Done] = []
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out {out} cannot be made ({error.strerror}); choose another directory"
            ) from None

    def run(self, steps: Sequence[Step], end: float) -> Iterator[Done]:
        """Until all are done or `end`, a time of the monotonic clock, is too near."""
        waiting = list(steps)
        while waiting:
            step = waiting.pop(0)
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                return
            before = len(self._records())
            done = self._run_step(step, min(left, step.seconds))
            found = len(self._records()) - before
            if done.status != "ok" and len(step.works) > 1:
                waiting += alone(step, found)
            self._done.append(done)
            self._write()
            yield done

    def markdown(self) -> str:
        records = self._records()
        parts = ["# GPU session"]
        if records:
            limits = report.limits_table(Limits(**records[0]["limits"]))
            parts += [str(records[0]["device"]), limits, report.latency_table(records)]
        for record in records:
            if record.get("peers"):
                parts += [f"Batch {record['bs']}, {record['isl']}/{record['osl']}:"]
                parts += [peers_table(record["peers"])]
        rows = [(done.name, done.status, f"{done.seconds:.1f}") for done in self._done]
        parts.append(report.make_table(("step", "status", "seconds"), rows))
        return "\n\n".join(parts)

    def _run_step(self, step: Step, seconds: float) -> Done:
        # A folder of its own, since a step that is killed leaves its engine behind.
        with tempfile.TemporaryDirectory(prefix="yi-step-", dir=self._work_dir) as own:
            flags = step.command(
                layers=self._layers,
                device=self._device,
                work_dir=own,
                results=self._results,
                tuning=self._tuning,
            )
            return self._run_command(step.name, flags, seconds)

    def _run_command(self, name: str, flags: Sequence[str], seconds: float) -> Done:
        start = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = child.communicate(timeout=seconds)
            status = "failed" if child.returncode else "ok"
        except subprocess.TimeoutExpired:
            said, status = end_group(child), "too slow"
        words = "\n".join(said.splitlines()[-LAST_LINES:])
        return Done(name, status, time.monotonic() - start, " ".join(flags), words)

    def _records(self) -> list[Any]:
        return report.read_records(self._results) if self._results.exists() else []

    def _write(self) -> None:
        steps = [asdict(done) for done in self._done]
        (self._out / "steps.json").write_text(json.dumps(steps, indent=1))
        (self._out / "report.md").write_text(self.markdown() + "\n")


def alone(step: Step, found: int) -> list[Step]:
    """A step for each workload that has no record, of which the first `found` have one."""
    return [
        replace(step, name=f"{step.name}, {work} alone", works=(work,))
        for work in step.works[found:]
    ]


def end_group(child: subprocess.Popen[str]) -> str:
    """End a step and what it started, and give what it said."""
    os.killpg(child.pid, signal.SIGTERM)
    try:
        return child.communicate(timeout=SECONDS_TO_END)[0]
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        return child.communicate()[0]


def choose_work_dir() -> str:
    """The RAM disk if it is large enough, else where temporary files go."""
    is_large = RAM_DISK.is_dir() and shutil.disk_usage(RAM_DISK).free >= RAM_DISK_BYTES
    return str(RAM_DISK) if is_large else tempfile.gettempdir()


if __name__ == "__main__":
    run_main(main)
