"""What a figure was measured on: device, versions, command."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from engine import env

PACKAGES = ("torch", "triton", "transformers", "llama-cpp-python", "vllm")
_CPU_INFO = Path("/proc/cpuinfo")


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def file_stem(name: str) -> str:
    """'NVIDIA H200' → 'nvidia-h200'."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def versions(device: torch.device) -> dict[str, str]:
    """Of Python, CUDA and the installed packages that make a difference."""
    found = {"python": platform.python_version()}
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def command(script: str, argv: Sequence[str] | None) -> str:
    """The command line that `script` was given, with this project's variables before it."""
    settings = [f"{name}={value}" for name, value in env.own_settings().items()]
    given = sys.argv[1:] if argv is None else argv
    return shlex.join([*settings, "python", *shlex.split(script), *given])


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
