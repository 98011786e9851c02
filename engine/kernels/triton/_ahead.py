"""Triton without a GPU: launches compile for the GPU that is imagined, and nothing runs.

For a process that does nothing else: it replaces Triton's driver and launches for good.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.cache import _base32
from triton.runtime.jit import JITFunction

from engine.kernels.gpu import Gpu
from engine.kernels.triton._store import TYPES_NAME, settle_keys

WARP = 32


class _AbsentDriver(DriverBase):
    """What a launch asks of the driver before it runs the kernel."""

    def __init__(self, gpu: Gpu):
        major, minor = gpu.capability
        self._target = GPUTarget("cuda", 10 * major + minor, WARP)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        raise AssertionError("nothing is launched")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise AssertionError("nothing is launched")

    def get_active_torch_device(self) -> Any:
        raise AssertionError("there is no device")

    def get_benchmarker(self) -> Any:
        raise AssertionError("nothing is measured")


def replace_launches(gpu: Gpu) -> None:
    """From now on launching a kernel makes what it needs on `gpu` and goes no further."""
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    settle_keys()
    driver.set_active(_AbsentDriver(gpu))
    JITFunction.run = compile_only


@contextmanager
def compiling_into(folder: Path, threads: int) -> Iterator[None]:
    """Compile what is launched meanwhile, in `threads` at a time; at the end all is in `folder`.

    Kernels that the assembler refuses are left out, as those that are measured are at run time.
    """
    triton.knobs.cache.dir = str(folder)
    triton.knobs.compilation.store_binary_only = True
    with ThreadPoolExecutor(threads) as pool:
        with triton.AsyncCompileMode(pool, ignore_errors=True) as mode:
            yield
        for future in mode.raw_futures:
            error = future.exception()
            if error is None:
                kernel = future.result()
                types = json.dumps(list(kernel.src.signature.values()))
                (folder / _base32(kernel.hash) / TYPES_NAME).write_text(types)
            elif not isinstance(error, triton.runtime.errors.PTXASError):
                raise error
