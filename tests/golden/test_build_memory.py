"""A build's memory is bounded by its blocks, not by the model: Yi-6B's tensors, two of its layers.

Every tensor has its full size, so the peak is that of the whole model's build. Needs 8 GB of disk.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

LIMIT_BYTES = 10**9
# The kernel's high-water mark of this very process: rusage would count its parent's, too.
MEASURED = """
import atexit, re, runpy, sys
def report():
    status = open("/proc/self/status").read()
    print("peak kB", re.search(r"VmHWM:\\s*(\\d+)", status)[1], file=sys.stderr)
atexit.register(report)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc"),
]


@pytest.fixture(scope="module")
def yi_6b(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("yi-6b") / "checkpoint"
    if shutil.disk_usage(folder.parent).free < 8 * 10**9:
        pytest.skip("needs 8 GB of disk")
    command = [sys.executable, "tools/make_checkpoint.py", "--preset", "yi-6b", "--layers", "2"]
    subprocess.run([*command, "--out", str(folder)], cwd=ROOT, check=True, capture_output=True)
    yield folder
    shutil.rmtree(folder)


# Of Yi-6B: weights of a layer's matrices, and of the embedding and the head.
LINEAR = 4096 * (5120 + 4096 + 3 * 11008)
TABLES = 2 * 64000 * 4096
LAYERS = 2


@pytest.mark.parametrize(
    "flags, bits, plain_bits, tables",
    [
        ("--dtype bfloat16", 16, 16, TABLES),
        ("--dtype bfloat16 --tp_size 2", 16, 16, TABLES * 3 // 2),
        ("--dtype bfloat16 --tp_size 4 --use_parallel_embedding", 16, 16, TABLES),
        ("--dtype bfloat16 --tp_size 2 --parallel_build", 16, 16, TABLES * 3 // 2),
        ("--dtype float32", 32, 32, TABLES),
        ("--dtype float16 --use_weight_only --tp_size 2", 8, 16, TABLES * 3 // 2),
        ("--dtype float16 --use_weight_only --weight_only_precision int4", 4, 16, TABLES),
        ("--dtype bfloat16 --enable_fp8", 8, 16, TABLES),
    ],
)
def test_peak_memory_and_size(yi_6b, tmp_path, flags, bits, plain_bits, tables):
    output = tmp_path / "engine"
    command = [sys.executable, "-c", MEASURED, "build.py", "--model_dir", str(yi_6b)]
    started = time.monotonic()
    result = subprocess.run(
        [*command, "--output_dir", str(output), *flags.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    seconds = time.monotonic() - started
    assert result.returncode == 0, result.stderr[-2000:]
    written = sum(path.stat().st_size for path in output.iterdir())
    shutil.rmtree(output)
    # With --parallel_build the largest process is another one, which the build measures itself.
    reported = re.search(r"peak memory ([\d,]+) MB", result.stdout)[1]
    peak = max(
        int(result.stderr.rpartition("peak kB")[2]) * 1024, int(reported.replace(",", "")) * 10**6
    )
    print(f"{written / 1e9 / seconds:.2f} GB/s with start-up, peak {peak / 1e6:.0f} MB")
    expected = (LAYERS * LINEAR * bits + tables * plain_bits) / 8
    assert abs(written / expected - 1) < 0.02
    assert peak < LIMIT_BYTES
