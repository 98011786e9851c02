"""How all kernels are launched: programmatic dependent launch, and what the device offers.

With PDL a kernel's programs take their places as soon as all of those before have theirs, and load
weights meanwhile. Every kernel therefore begins with `gdc_launch_dependents`, and calls `gdc_wait`,
which waits until the kernel before has ended, in each program before it reads or writes memory that
another kernel writes or reads; weights and scales may be read before. Both stand under its
constexpr `PDL`. A kernel that did not wait would free its successor too early, so the switch is for
all of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from engine.kernels import gpu

PDL = True

# Multiprocessors that a launch is planned for where there is no GPU (Triton's interpreter).
INTERPRETED_PROCESSORS = 4


def launch_options(device: torch.device) -> dict[str, Any]:
    """Keywords of every launch: the kernel's constexpr `PDL` and the attribute it needs."""
    if PDL and has_pdl(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) in the interpreter."""
    return (0, 0) if device.type == "cpu" else gpu.capability(device)


def has_pdl(device: torch.device) -> bool:
    """Programmatic dependent launch came with Hopper."""
    return capability(device) >= (9, 0)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    if target := gpu.imagined(device):
        return target.processors
    return torch.cuda.get_device_properties(device).multi_processor_count
