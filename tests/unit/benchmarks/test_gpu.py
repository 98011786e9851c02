"""The GPU session: commands that its scripts understand, limits of time, and what is left after."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import benchmark
from benchmarks import gpu, peers
from benchmarks.gpu import STEPS, GpuSession, Step
from utils.benchmarking.plan import plan_benchmark


@pytest.mark.parametrize("tuning", [True, False])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_command_is_understood(step, tuning, tmp_path):
    where = {"work_dir": str(tmp_path), "results": tmp_path / "results.json"}
    command = step.command(layers=8, device="cuda", tuning=tuning, **where)
    if command[0] == "-m":
        assert command[:2] == ["-m", "benchmarks.peers"]
        args = peers.make_parser().parse_args(command[2:])
        assert args.layers == 8
        assert args.peers == ["transformers", "vllm"]
        return
    assert command[0] == "benchmark.py"
    plan = plan_benchmark(vars(benchmark.make_parser().parse_args(command[1:])))
    if step.preset is not None:
        assert len(plan.works(8)) == len(step.works)
        assert plan.dummy.layers == (None if step.is_whole else 8)
        assert plan.tuning == tuning


class Scripted(GpuSession):
    """Runs small programs in place of measurements."""

    programs: dict[str, str] = {}

    def _run_step(self, step: Step, seconds: float):
        code = self.programs[step.name].replace("RESULTS", repr(str(self._results)))
        return self._run_command(step.name, ["-c", code], seconds)


def run(tmp_path: Path, programs: dict[str, str], *steps: Step, seconds: float = 100.0):
    session = Scripted(tmp_path, 8, "cpu", str(tmp_path))
    session.programs = programs
    done = list(session.run(steps, time.monotonic() + seconds))
    return session, done


def test_what_a_failed_step_left_out_runs_alone(tmp_path):
    record = {"model": "m", "mode": "none", "dtype": "bfloat16", "bs": 1, "isl": 2, "osl": 3}
    record |= {
        "device": "card",
        "limits": {"device": "cuda", "copy": 3e12, "read": 1, "products": {}},
    }
    programs = {
        "three": f"import json; json.dump([{record}], open(RESULTS, 'w')); 1 / 0",
        "three, 2,2,2 alone": "pass",
        "three, 3,3,3 alone": "pass",
    }
    step = Step("three", "yi-6b", works=("1,1,1", "2,2,2", "3,3,3"))
    session, done = run(tmp_path, programs, step)
    assert [d.status for d in done] == ["failed", "ok", "ok"]
    assert [d.name for d in done[1:]] == list(programs)[1:]
    assert "ZeroDivisionError" in done[0].words
    assert json.loads((tmp_path / "steps.json").read_text())[0]["status"] == "failed"
    report = (tmp_path / "report.md").read_text()
    assert "| m " in report
    assert "3,000.0 GB/s" in report


def test_a_slow_step_is_ended(tmp_path):
    programs = {"slow": "print('begun', flush=True); import time; time.sleep(60)", "next": "pass"}
    slow = Step("slow", seconds=1.0)
    _, done = run(tmp_path, programs, slow, Step("next"))
    assert [d.status for d in done] == ["too slow", "ok"]
    assert done[0].words == "begun"
    assert done[0].seconds < 10


def test_no_step_begins_without_time(tmp_path):
    _, done = run(tmp_path, {}, Step("never"), seconds=gpu.LEAST_SECONDS / 2)
    assert done == []
