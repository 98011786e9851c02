"""What the device can do at most: memory bandwidth and matrix products, measured now.

Memory is read and copied in buffers far larger than any cache; products are of random numbers,
since zeros take less power and so run faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

BUFFER_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
# Calls that are timed together, and how often; the fastest time counts.
CALLS = {"cpu": 1, "cuda": 10}
ROUNDS = 5
# Compute capability of the first GPUs with FP8 products.
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Limits:
    """Bytes per second of copying (read and written ones) and of reading alone, and operations per
    second of a square matrix product by type."""

    device: str
    copy: float
    read: float
    products: Mapping[str, float]

    @property
    def bandwidth(self) -> float:
        """What a share of the limit is taken of: on a GPU the copy, on a CPU the faster of both,
        since the lines that a processor writes are read first."""
        return self.copy if self.device == "cuda" else max(self.copy, self.read)

    def product(self, kind: str) -> float | None:
        """Of `kind`, a type of activations; 16-bit types are alike."""
        return self.products.get("bfloat16" if kind == "float16" else kind)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def combine(parts: Sequence[Limits]) -> Limits:
    """Of ranks that measured at the same time."""
    return Limits(
        device=parts[0].device,
        copy=sum(part.copy for part in parts),
        read=sum(part.read for part in parts),
        products={kind: sum(p.products[kind] for p in parts) for kind in parts[0].products},
    )


def measure_limits(device: torch.device) -> Limits:
    """Takes a few seconds, and on a GPU 5 GB, which are given back."""
    copy, read = _measure_memory(device)
    limits = Limits(device.type, copy, read, _measure_products(device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return limits


def _measure_memory(device: torch.device) -> tuple[float, float]:
    size = BUFFER_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    copying = _seconds(lambda: target.copy_(source), device)
    reading = _seconds(source.sum, device)
    return 2 * size / copying, size / reading


def _measure_products(device: torch.device) -> dict[str, float]:
    size = PRODUCT_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device)
    candidates: dict[str, Callable[[], Tensor]] = {
        "bfloat16": _product(a.bfloat16(), b.bfloat16()),
        "float32": _product(a, b),
        "int8": _int8_product(a, b),
    }
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY:
        candidates["fp8"] = _fp8_product(a, b)
    return {kind: 2 * size**3 / _seconds(run, device) for kind, run in candidates.items()}


def _product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    return lambda: a @ b.T


def _int8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    a_codes, b_codes = ((x * 40).clamp(-127, 127).to(torch.int8) for x in (a, b))
    return lambda: torch._int_mm(a_codes, b_codes.T)


def _fp8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    a_codes, b_codes = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device=a.device)
    settings = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
    return lambda: torch._scaled_mm(a_codes, b_codes.T, use_fast_accum=True, **settings)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of a call, the best of a few rounds after one that warms up."""
    calls = CALLS[device.type]
    best = float("inf")
    for _ in range(1 + ROUNDS):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        _wait(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
