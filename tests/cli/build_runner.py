"""Runs build.py as its users do: in this process, where that is enough, or in one of its own."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import build
from tests.conftest import ROOT, log_as_before
from utils.cli import run_main

# Flags of a model of 20 kB without a checkpoint.
SMALL_DUMMY = (
    "--n_layer=2", "--n_embd=32", "--n_head=4", "--n_kv_head=2", "--inter_size=48",
    "--vocab_size=61", "--n_positions=128", "--max_input_len=32", "--max_output_len=16",
)  # fmt: skip


class Finished(NamedTuple):
    status: int
    stdout: str
    stderr: str


def run_here(*flags: str | Path) -> Finished:
    """build.py's whole main, with what it prints and the status it exits with."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    argv = ["build.py", *map(str, flags)]
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            log_as_before(),
        ):
            run_main(build.main)
    except SystemExit as end:
        return Finished(int(end.code or 0), out.getvalue(), err.getvalue())
    finally:
        signal.signal(signal.SIGTERM, before)
    raise AssertionError("run_main always exits")


def start(*flags: str | Path) -> subprocess.Popen[str]:
    """build.py in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, "build.py", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_alone(*flags: str | Path) -> Finished:
    with start(*flags) as process:
        stdout, stderr = process.communicate(timeout=300)
    return Finished(process.returncode, stdout, stderr)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
