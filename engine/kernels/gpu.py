"""What kernels ask of a GPU: of the one at hand, or of one that they are only compiled for.

Tensors on the meta device stand for such a GPU, which `imagine` describes; see engine/ahead.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """Compute capability, multiprocessors, and bytes of shared memory that a program may take
    (CUDA C++ Programming Guide, technical specifications per compute capability)."""

    capability: tuple[int, int]
    processors: int
    shared_bytes: int


# Architecture → its cards, where their numbers of multiprocessors lead to different launches.
TARGETS: dict[str, tuple[Gpu, ...]] = {
    "sm_80": (Gpu((8, 0), 108, 163 << 10),),  # A100
    "sm_86": (Gpu((8, 6), 84, 99 << 10), Gpu((8, 6), 72, 99 << 10)),  # RTX A6000, A10
    "sm_89": (Gpu((8, 9), 142, 99 << 10), Gpu((8, 9), 58, 99 << 10)),  # L40S, L4
    "sm_90": (Gpu((9, 0), 132, 227 << 10), Gpu((9, 0), 114, 227 << 10)),  # H100/H200, H100 PCIe
    "sm_100": (Gpu((10, 0), 148, 227 << 10),),  # B200
    "sm_120": (Gpu((12, 0), 188, 99 << 10), Gpu((12, 0), 170, 99 << 10)),  # RTX PRO 6000, RTX 5090
}

_imagined: list[Gpu] = []


def imagine(gpu: Gpu) -> None:
    """Let the meta device be `gpu`, once in a process: what is asked of a device is remembered."""
    assert not _imagined
    _imagined.append(gpu)


def imagined(device: torch.device) -> Gpu | None:
    """The GPU that `device` stands for without being one."""
    return _imagined[0] if device.type == "meta" and _imagined else None


def kind(device: torch.device) -> str:
    """The device type whose kernels `device` gets."""
    return "cuda" if imagined(device) else device.type


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU."""
    gpu = imagined(device)
    return gpu.capability if gpu else torch.cuda.get_device_capability(device)
