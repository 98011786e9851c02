"""Which implementations of an operation exist, and which one a device gets.

A file engine/kernels/triton/<op>.py is an implementation of <op> just by being there: it defines
a function of that name. Other modules have a line in FAMILIES. Modules load at first use, so
nothing here needs Triton or a GPU.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import UserError
from engine.kernels import gpu

TRITON_FOLDER = Path(__file__).parent / "triton"

# Triton kernels are written for Ampere and later (bf16 tensor cores, asynchronous copies).
TRITON_MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Implementation:
    """One way to compute `op`. Calling it calls the function at `target` ("module:function").

    `min_capability` is the least CUDA compute capability that runs it.
    """

    op: str
    name: str
    devices: tuple[str, ...]
    target: str
    min_capability: tuple[int, int] | None = None

    def load(self) -> Callable[..., Any]:
        module, _, function = self.target.partition(":")
        return getattr(import_module(module), function)

    def load_bound(self) -> Callable[..., Callable[[Tensor], Tensor]] | None:
        """The class that fixes the operation's weights, where the module has one."""
        module = import_module(self.target.partition(":")[0])
        return getattr(module, "BOUND", {}).get(self.op)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load()(*args, **kwargs)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def serves(self, device: torch.device) -> bool:
        if gpu.kind(device) not in self.devices:
            return False
        if gpu.kind(device) != "cuda" or self.min_capability is None:
            return True
        return gpu.capability(device) >= self.min_capability

    def describe(self) -> str:
        """Name and needs, as error messages list them."""
        needs = ", ".join(self.devices)
        if self.min_capability is not None:
            needs += " of compute capability {}.{} or newer".format(*self.min_capability)
        return f"{self.name} ({needs})"


class Family(NamedTuple):
    """A module that implements several operations by functions of their names."""

    name: str
    module: str
    devices: tuple[str, ...]
    ops: tuple[str, ...]


QUANTISED_LINEARS = (
    "linear_int8",
    "linear_int4",
    "linear_int4_groups",
    "linear_w8a8",
    "linear_fp8",
)

# Earlier lines are preferred; Triton files come before them all.
FAMILIES = (
    Family("cpu", "engine.kernels.quantized_cpu", ("cpu",), QUANTISED_LINEARS),
    Family("reference", "engine.kernels.quantized_reference", ("cpu", "cuda"), QUANTISED_LINEARS),
    Family(
        "cpu",
        "engine.kernels.cpu",
        ("cpu",),
        (
            "linear",
            "rms_norm",
            "rope",
            "write_kv",
            "rope_write_kv",
            "attention",
            "rope_attention",
        ),
    ),
    Family(
        "reference",
        "engine.kernels.reference",
        ("cpu", "cuda"),
        (
            "linear",
            "rms_norm",
            "rope",
            "silu_mul",
            "embedding",
            "write_kv",
            "attention",
            "rope_write_kv",
            "rope_attention",
            "rotary_angles",
            "argmax",
            "logsumexp",
            "draw",
            "take_tokens",
            "place_tokens",
        ),
    ),
)

_overrides: dict[str, str] = {}
_selected: dict[tuple[str, str], Callable[..., Any]] = {}


def select(op: str, device: torch.device) -> Callable[..., Any]:
    """The preferred implementation of `op` for `device`; chosen once per op and device type.

    Raises UserError, listing the candidates, when none serves the device.
    """
    key = (op, device.type)
    if key not in _selected:
        _selected[key] = _choose(op, device).load()
    return _selected[key]


def runs_by(name: str, op: str, device: torch.device) -> bool:
    """Whether `device` gets the implementation called `name` of `op`."""
    return _choose(op, device).name == name


def bind(op: str, *weights: Any) -> Callable[[Tensor], Tensor]:
    """The quantised operation `op` with its weights fixed: x [T, K] → y [T, N].

    A module that wants weights in a layout of its own lists a class in BOUND that makes it, once.
    """
    chosen = _choose(op, weights[0].device)
    if bound := chosen.load_bound():
        return bound(*weights)
    run = chosen.load()
    return lambda x_TK: run(x_TK, *weights)


def implementations(op: str, devices: Collection[str] | None = None) -> list[Implementation]:
    """Those of `op` that run on one of `devices` (default: the device types present here)."""
    devices = present_devices() if devices is None else devices
    return [
        candidate
        for candidate in _candidates(op)
        if any(candidate.serves(torch.device(device)) for device in devices)
    ]


def present_devices() -> tuple[str, ...]:
    """Device types of this machine that implementations exist for."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@contextmanager
def override(name: str, *ops: str) -> Iterator[None]:
    """Run `ops` (default: every op that has one) by the implementation called `name`.

    For tests and benchmarks; process-wide.
    """
    known = {candidate.op for candidate in _table() if candidate.name == name}
    assert known.issuperset(ops) and known, f"no implementation {name!r} of {ops or 'any op'}"
    before = dict(_overrides)
    _overrides.update(dict.fromkeys(ops or known, name))
    _selected.clear()
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
        _selected.clear()


def _choose(op: str, device: torch.device) -> Implementation:
    candidates = _candidates(op)
    if op in _overrides:
        candidates = [c for c in candidates if c.name == _overrides[op]]
    for candidate in candidates:
        if candidate.serves(device):
            return candidate
    known = "; ".join(candidate.describe() for candidate in candidates)
    raise UserError(f"device {device} has no implementation of {op}; run on one of these: {known}")


def _candidates(op: str) -> list[Implementation]:
    candidates = [candidate for candidate in _table() if candidate.op == op]
    assert candidates, f"no operation is called {op!r}"
    return candidates


@cache
def _table() -> tuple[Implementation, ...]:
    return (
        *_triton_files(),
        *(
            Implementation(op, family.name, family.devices, f"{family.module}:{op}")
            for family in FAMILIES
            for op in family.ops
        ),
    )


def _triton_files() -> Iterator[Implementation]:
    if find_spec("triton") is None:
        return
    for module in pkgutil.iter_modules([str(TRITON_FOLDER)]):
        # Names with an underscore are helpers that several kernels share.
        if not module.name.startswith("_"):
            target = f"engine.kernels.triton.{module.name}:{module.name}"
            yield Implementation(module.name, "triton", ("cuda",), target, TRITON_MIN_CAPABILITY)
