"""Peak memory of a stretch of work: a GPU's own count, or how far this process grew."""

from __future__ import annotations

import gc
import re
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
# What Linux wants written to forget the highest resident size so far.
_FORGET_PEAK = "5"


class PeakMemory:
    """Measures from entry to exit; `bytes` is None where the system does not tell.

    On GPUs: the most that tensors of this process took, over all of its GPUs. On a CPU: the highest
    resident size less the one at entry, so that libraries loaded before do not count.
    """

    def __init__(self, *, on_gpu: bool):
        self.bytes: int | None = None
        self._on_gpu = on_gpu
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._on_gpu:
            _reset_gpus()
        elif _forget_peak():
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        self.update()

    def update(self) -> None:
        """Let `bytes` be what was measured until now."""
        if self._on_gpu:
            self.bytes = _peak_of_gpus()
            return
        peak = _resident("VmHWM")
        if self._before is not None and peak is not None:
            self.bytes = max(peak - self._before, 0)


def release_memory() -> None:
    """Give back what a model that nobody refers to any more has left behind."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _reset_gpus() -> None:
    import torch

    torch.cuda.init()
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def _peak_of_gpus() -> int:
    import torch

    return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))


def _forget_peak() -> bool:
    with suppress(OSError):
        _RESET.write_text(_FORGET_PEAK, encoding="ascii")
        return True
    return False


def _resident(name: str) -> int | None:
    """A size in bytes out of this process's status, None outside Linux."""
    with suppress(OSError):
        found = re.search(rf"^{name}:\s*(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.M)
        return int(found[1]) * 1024 if found else None
    return None
