"""Libraries made of the C++ files here: compiled at first use, never at import.

A library is kept under a name that holds everything it depends on, so that another CPU, compiler
or source makes another one. Without a compiler the callers use PyTorch's operations.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock

import torch

from engine import env

FOLDER = Path(__file__).parent
FLAGS = ("-std=gnu++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
         "-fopenmp", "-shared", "-fPIC")  # fmt: skip
OWN_CPU = ("-march=native",)
COMPILE_SECONDS = 120

logger = logging.getLogger("yi.kernels")
_libraries: dict[str, ctypes.CDLL | None] = {}
_lock = Lock()


def load(name: str) -> ctypes.CDLL | None:
    """The library of `name`.cpp for this CPU; None where it cannot be made, logged once."""
    with _lock:
        if name not in _libraries:
            _libraries[name] = _load(name)
        return _libraries[name]


def build(name: str, compiler: str, target: Sequence[str], folder: Path) -> Path:
    """The library of `name`.cpp in `folder`, compiled unless it is there.

    Raises OSError or subprocess.SubprocessError when that fails.
    """
    source = FOLDER / f"{name}.cpp"
    path = folder / f"{name}-{_fingerprint(compiler, source, target)}.so"
    if not path.exists():
        _compile(compiler, source, target, path)
    return path


def _load(name: str) -> ctypes.CDLL | None:
    compiler = env.cxx_compiler()
    if compiler is None:
        logger.info("no C++ compiler was found: %s runs by PyTorch's slower operations", name)
        return None
    try:
        return ctypes.CDLL(str(build(name, compiler, OWN_CPU, env.cache_folder())))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "%s was not compiled (%s): PyTorch's slower operations are used", name, error
        )
        return None


def _fingerprint(compiler: str, source: Path, target: Sequence[str]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_SECONDS)
    headers = [path.read_bytes() for path in sorted(FOLDER.glob("*.h"))]
    words = (*FLAGS, *target, _cpu(), str(_openmp()))
    parts = (source.read_bytes(), *headers, version.stdout, *(word.encode() for word in words))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@cache
def _cpu() -> str:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, source: Path, target: Sequence[str], path: Path) -> None:
    """Written aside and moved into place, since several ranks may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, *target, str(source), "-o", str(made), *_link_flags()]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        if finished.returncode:
            raise OSError(f"{compiler}: {finished.stderr.strip()}")
        os.replace(made, path)


def _link_flags() -> list[str]:
    openmp = _openmp()
    if openmp is None:
        return []
    libraries = ["-lstdc++", "-lm", "-lc", "-lgcc_s"]
    return ["-nodefaultlibs", str(openmp), f"-Wl,-rpath,{openmp.parent}", *libraries]


@cache
def _openmp() -> Path | None:
    """PyTorch's own OpenMP library: a second one would have threads of its own, which fight with
    PyTorch's for the cores."""
    package = Path(torch.__file__).parent
    folders = (package / "lib", package.parent / "torch.libs")
    found = sorted(path for folder in folders for path in folder.glob("libgomp*.so*"))
    return found[0] if found else None
