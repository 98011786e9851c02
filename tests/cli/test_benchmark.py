"""benchmark.py: its frozen flags, every refusal's sentence, and a measurement of a small engine."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from importlib.util import find_spec
from unittest import mock

import pytest

import benchmark
from tests.mpi import run_ranks
from utils.benchmarking import limits
from utils.cli import run_main

FLAGS = {
    "batch_size",
    "device",
    "dtype",
    "dummy",
    "engine_dir",
    "help",
    "input_output_len",
    "json",
    "kv",
    "layers",
    "log_level",
    "no_tuning",
    "num_requests",
    "oversubscribe_gpu",
    "plot",
    "quant",
    "quantize_lm_head",
    "repeats",
    "work_dir",
    "workload",
}
TINY = ("--dummy", "tiny", "--layers", "2")


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """Measured in no time, and by that much too low."""
    monkeypatch.setattr(limits, "BUFFER_BYTES", {"cpu": 1 << 22})
    monkeypatch.setattr(limits, "PRODUCT_SIZE", {"cpu": 64})


def run(*flags):
    """(status, stdout, stderr) of benchmark.py."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    argv = ["benchmark.py", *map(str, flags)]
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            run_main(benchmark.main)
    except SystemExit as end:
        return end.code, out.getvalue(), err.getvalue()
    finally:
        signal.signal(signal.SIGTERM, before)
    raise AssertionError("run_main always exits")


def last_document(stdout: str) -> dict:
    return json.loads(stdout.splitlines()[-1])


def test_flags_are_frozen():
    actions = benchmark.make_parser()._actions
    flags = {name[2:] for action in actions for name in action.option_strings if name[:2] == "--"}
    assert flags == FLAGS


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("speed",), "mode: invalid choice: 'speed'"),
        (("latency", "--num_requests", "3"), "--num_requests has no meaning for 'latency'"),
        (("limits", "--dummy", "tiny"), "--dummy has no meaning for 'limits'"),
        (
            ("kernels", "--plot", "a.png"),
            "--plot has no meaning for 'kernels', it belongs",
        ),
        (("latency", *TINY, "--engine_dir", "e"), "--dummy and --engine_dir cannot be combined"),
        (("latency", "--quant", "int8"), "--quant belongs to --dummy, which builds an engine; add"),
        (("latency", "--quantize_lm_head"), "--quantize_lm_head belongs to --dummy, which builds"),
        (
            ("latency", "--dummy", "tiny", "--layers", "7"),
            "--layers 7 exceeds the 6 layers of",
        ),
        (("latency", "--input_output_len", "128"), "--input_output_len '128' is not two lengths"),
        (("latency", "--input_output_len", "0,4"), "--input_output_len '0,4' is not two lengths"),
        (("latency", "--workload", "1,2"), "--workload '1,2' is not a batch size and two lengths"),
        (
            ("latency", "--workload", "1,2,3", "--batch_size", "2"),
            "--workload and --batch_size",
        ),
        (("latency", *TINY, "--work_dir", "/no/such"), "--work_dir /no/such is no directory; name"),
        (("latency", "--engine_dir", "/no/such"), "--engine_dir /no/such does not exist"),
    ],
)
def test_mistakes_get_a_sentence(flags, sentence):
    status, stdout, stderr = run(*flags)
    assert (status, stdout) == (2, "")
    assert stderr.startswith(f"benchmark.py: error: {sentence}")
    assert stderr.count("\n") == 1


def test_a_batch_larger_than_the_engine_is_refused(tmp_path):
    from tests.cli.build_runner import SMALL_DUMMY, run_here

    assert run_here(*SMALL_DUMMY, "--max_batch_size=2", "--output_dir", tmp_path).status == 0
    status, _, stderr = run("latency", "--engine_dir", tmp_path, "--workload", "3,4,2")
    assert status == 2
    assert "--batch_size 3 exceeds the engine's --max_batch_size 2; measure smaller" in stderr
    # The engine's own limits of lengths hold, too.
    status, _, stderr = run("latency", "--engine_dir", tmp_path, "--workload", "2,40,2")
    assert (status, "--max_input_len 32" in stderr) == (2, True)


def test_latency_of_a_dummy_engine(tmp_path):
    results, plot = tmp_path / "results.json", tmp_path / "roofline.png"
    status, stdout, stderr = run(
        "latency", *TINY, "--device", "cpu", "--batch_size", 1, 2, "--input_output_len", "16,8",
        "--repeats", 2, "--json", results, "--plot", plot, "--work_dir", tmp_path,
    )  # fmt: skip
    assert status == 0, stderr
    found = last_document(stdout)
    assert json.loads(results.read_text()) == found["records"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [record["bs"] for record in found["records"]] == [1, 2]
    # Nothing of the engine is left.
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "roofline.png"}
    for record in found["records"]:
        check_record(record)


def check_record(record: dict) -> None:
    assert (record["task"], record["model"]) == ("latency", "tiny, 2 of 6 layers")
    assert (record["isl"], record["osl"]) == (16, 8)
    # Two layers of q 256x256, k and v 128x256, o and a 768 wide MLP, a head of 4096, five norms.
    layer = 256 * (256 + 2 * 128 + 256) + 3 * 256 * 768
    weights = 2 * (2 * layer + 4096 * 256 + 5 * 256)
    # 20 positions, 2 layers, keys and values, 2 heads of 64, 2 bytes.
    cache = 20 * 2 * 2 * 2 * 64 * 2
    assert record["bytes_per_token"] == weights / record["bs"] + cache
    bandwidth = max(record["limits"]["copy"], record["limits"]["read"])
    read = record["decode_tokens_per_s"] * record["bytes_per_token"]
    assert record["gb_per_s"] == pytest.approx(read / 1e9)
    assert record["share"] == pytest.approx(read / bandwidth)
    steps = record["bs"] * 7 / (record["whole_s"] - record["first_token_s"])
    assert record["decode_tokens_per_s"] == pytest.approx(steps)
    assert record["tokens_per_s"] == pytest.approx(record["bs"] * 8 / record["whole_s"])
    assert {"device", "threads", "versions", "command", "date", "load_s", "build_s"} <= set(record)


def test_a_quantised_head_is_in_the_record():
    flags = ("latency", *TINY, "--device", "cpu", "--input_output_len", "8,2", "--repeats", 1)
    records = []
    for more in ((), ("--quantize_lm_head",)):
        status, stdout, stderr = run(*flags, "--quant", "int8", *more)
        assert status == 0, stderr
        records += last_document(stdout)["records"]
    plain, found = records
    assert (plain["mode"], found["mode"]) == ("w8a16", "w8a16, w8a16 head")
    # 4096 rows of 256: a byte less each, and a scale of 4.
    assert plain["bytes_per_token"] - found["bytes_per_token"] == 4096 * (256 - 4)


def test_throughput_of_a_quantised_engine():
    status, stdout, stderr = run(
        "throughput", *TINY, "--quant", "int8", "--device", "cpu", "--batch_size", 2,
        "--num_requests", 5, "--input_output_len", "8,4", "--repeats", 1,
    )  # fmt: skip
    assert status == 0, stderr
    [record] = last_document(stdout)["records"]
    assert (record["mode"], record["requests"]) == ("w8a16", 5)
    assert record["tokens_per_s"] == pytest.approx(5 * 4 / record["whole_s"])
    assert record["total_tokens_per_s"] == pytest.approx(5 * 12 / record["whole_s"])


def test_limits_alone():
    status, stdout, _ = run("limits", "--device", "cpu")
    assert status == 0
    found = last_document(stdout)
    assert found["records"] == []
    assert set(found["limits"]["products"]) == {"bfloat16", "float32", "int8"}
    assert all(rate > 0 for rate in found["limits"]["products"].values())


def test_kernels_are_measured_by_programs_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "first.py").write_text("print('| a row |'); print('{\"us\": 3}')")
    (tmp_path / "second.py").write_text("print('| no document |')")
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "KERNEL_BENCHMARKS", {"cpu": ("first", "second")})
    status, stdout, _ = run("kernels", "--device", "cpu")
    assert status == 0
    assert "| a row |" in stdout
    assert last_document(stdout)["kernels"] == {"first": {"us": 3}, "second": None}


def test_a_kernel_benchmark_that_fails_is_no_success(tmp_path, monkeypatch):
    (tmp_path / "wrong.py").write_text("raise SystemExit(5)")
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "KERNEL_BENCHMARKS", {"cpu": ("wrong", "never")})
    assert run("kernels", "--device", "cpu")[0] == 5


@pytest.mark.parametrize("device", benchmark.KERNEL_BENCHMARKS)
def test_kernel_benchmarks_are_there(device):
    for name in benchmark.KERNEL_BENCHMARKS[device]:
        assert find_spec(name) is not None


@pytest.mark.mpi
def test_two_ranks_measure_one_engine():
    done = run_ranks(2, ["-c", RANKS])
    assert done.returncode == 0, done.stderr
    # Rank 0 alone prints; the engine was cut among both.
    [record] = last_document(done.stdout)["records"]
    assert (record["tp"], done.stdout.count("| tiny")) == (2, 1)
    # The head of 4096 is cut, the norms are not.
    layer = 256 * (256 + 2 * 128 + 256) + 3 * 256 * 768
    weights = 2 * (2 * layer + 4096 * 256 + 2 * 5 * 256)
    assert record["bytes_per_token"] == weights + 6 * 2 * 2 * 2 * 64 * 2


RANKS = """
import benchmark
from utils.benchmarking import limits
from utils.cli import run_main

limits.BUFFER_BYTES, limits.PRODUCT_SIZE = {"cpu": 1 << 22}, {"cpu": 64}
flags = "latency --dummy tiny --layers 2 --device cpu --workload 1,4,4 --repeats 1"
run_main(lambda argv: benchmark.main(flags.split()))
"""
