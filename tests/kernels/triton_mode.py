"""Where Triton kernels are tested: on the GPU, or on the CPU in Triton's interpreter without one.

The interpreter is chosen when Triton is imported, so tests/conftest.py imports this first; a test
of Triton kernels calls `prepare_interpreter` before it imports them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = DEVICE == "cpu"

if IS_INTERPRETED and os.environ.get("TRITON_INTERPRET") != "1":
    assert "triton" not in sys.modules, "Triton was imported before its mode was chosen"
    os.environ["TRITON_INTERPRET"] = "1"

_originals: dict[str, Any] = {}


def prepare_interpreter() -> None:
    """Skip the calling file without Triton; let Triton 3.6's interpreter compute what GPUs do."""
    pytest.importorskip("triton")
    if not IS_INTERPRETED or _originals:
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    for owner, name in (
        (builder, "cast_impl"),
        (builder, "create_fp_to_fp"),
        (builder, "create_fma"),
        (builder, "create_dot"),
        (interpreter, "_patch_lang_tensor"),
    ):
        _originals[name] = getattr(owner, name)
        setattr(owner, name, globals()[f"_{name.removeprefix('_')}"])


def _cast_impl(builder: Any, source: Any, dtype: Any) -> Any:
    """fp32 to bf16 to nearest, ties to even; the interpreter truncates."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
        return _originals["cast_impl"](builder, source, dtype)
    rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16)
    return TensorHandle(rounded.numpy(), tl.bfloat16)


def _create_fp_to_fp(builder: Any, source: Any, dtype: Any, rounding: Any) -> Any:
    """fp32 to float8 to nearest, ties to even, saturating; the interpreter truncates."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if source.dtype.scalar != tl.float32 or dtype.scalar != tl.float8e4nv:
        return _originals["create_fp_to_fp"](builder, source, dtype, rounding)
    inside = torch.from_numpy(source.data.copy()).clamp(-448, 448)
    rounded = inside.to(torch.float8_e4m3fn).view(torch.uint8)
    return TensorHandle(rounded.numpy(), tl.float8e4nv)


def _create_fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """One rounding for both operations of fp32, as fp64's product of two fp32 is exact."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return TensorHandle(wide.astype(x.data.dtype), z.dtype.scalar)


def _create_dot(builder: Any, a: Any, b: Any, *args: Any) -> Any:
    """Products of bf16, which the interpreter keeps as the integers of their bits."""
    import triton.language as tl

    a, b = (
        builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
    )
    return _originals["create_dot"](builder, a, b, *args)


def _patch_lang_tensor(tensor: type, scope: Any) -> None:
    """Scalars are arrays of one element, which NumPy 2.4 does not take for integers any more."""
    _originals["_patch_lang_tensor"](tensor, scope)
    tensor.__index__ = lambda self: self.handle.data.item()


def run_compiled(module: str, *args: str) -> str:
    """Output of `python -m module` in a process where Triton compiles, for a target, without GPU.

    The interpreter replaces the compiler for a whole process.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *args]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout
