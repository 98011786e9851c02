"""Which way to compute y = x @ wᵀ on this CPU: the measurement behind engine/kernels/cpu.py.

    python -m benchmarks.cpu_linear [bfloat16] [float16] [float32] [int4] [int8] [w8a8]

Times the candidates on Yi-6B's matrices and on small ones, T tokens at a time, and prints a
Markdown row each: milliseconds, the 10th percentile of single calls. Weights rotate through
copies larger than the last-level cache, as in a model. A candidate whose result is wrong by more
than a rounding of the output stops the run. Set OMP_NUM_THREADS for the number of threads; it
must not exceed the cores that are idle.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import cpu, cpu_int4, cpu_int8
from engine.kernels.native import compiled, dense

SHAPES_NK = {
    "qkv": (5120, 4096),
    "o": (4096, 4096),
    "gate_up": (22016, 4096),
    "down": (4096, 11008),
    "head": (64000, 4096),
    "2048": (2048, 2048),
    "1024": (1024, 1024),
    "256": (256, 256),
}
TOKENS = (1, 2, 4, 16, 128)
ROTATED_BYTES = 160e6
MAX_COPIES = 64
MIN_CALLS, MIN_SECONDS = 3, 0.4
INT4_GROUP, INT4_BLOCK = 128, 64

Prepared = Callable[[Tensor, int], Tensor]


def library(weights: list[Tensor]) -> Prepared:
    return lambda x, i: F.linear(x, weights[i])


def aten(weights: list[Tensor]) -> Prepared:
    return lambda x, i: cpu.linear_without_onednn(x, weights[i])


def packed(weights: list[Tensor]) -> Prepared:
    """oneDNN's own weight layout, made once: what a load-time packing would give."""
    layouts = [torch.ops.mkldnn._reorder_linear_weight(w, 1) for w in weights]
    run = torch.ops.mkldnn._linear_pointwise
    return lambda x, i: run(x, layouts[i], None, "none", [], "")


def widened(weights: list[Tensor]) -> Prepared:
    return lambda x, i: cpu.linear_in_fp32(x, weights[i])


def native(weights: list[Tensor]) -> Prepared:
    """The own kernel, whatever the number of tokens."""
    library = compiled.load("dense")
    assert library is not None, "no C++ compiler"
    return lambda x, i: dense.multiply(library, x, weights[i])


def chosen(weights: list[Tensor]) -> Prepared:
    return lambda x, i: cpu.linear(x, weights[i])


CANDIDATES = {
    torch.bfloat16: (library, aten, packed, native, chosen),
    torch.float16: (library, widened, native, chosen),
    torch.float32: (library, aten, packed, native, chosen),
}


def time_ms(run: Prepared, x_TK: Tensor, copies: int) -> float:
    """10th percentile of single calls: what the call takes while nothing else disturbs it."""
    run(x_TK, 0)
    seconds: list[float] = []
    while len(seconds) < MIN_CALLS or sum(seconds) < MIN_SECONDS:
        start = time.perf_counter()
        run(x_TK, len(seconds) % copies)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 10] * 1e3


def check(y_TN: Tensor, x_TK: Tensor, w_NK: Tensor) -> None:
    wide_TN = F.linear(x_TK.float(), w_NK.float())
    limit = 4 * torch.finfo(y_TN.dtype).eps * wide_TN.abs().max()
    assert (y_TN.float() - wide_TN).abs().max() <= max(limit, 1e-4), "wrong result"


def measure(name: str, dtype: torch.dtype) -> None:
    outputs, inputs = SHAPES_NK[name]
    copies = min(MAX_COPIES, int(ROTATED_BYTES / (outputs * inputs * dtype.itemsize)) + 2)
    first = torch.randn(outputs, inputs).mul_(inputs**-0.5).to(dtype)
    weights = [first, *(first.clone() for _ in range(copies - 1))]
    prepared = {candidate.__name__: candidate(weights) for candidate in CANDIDATES[dtype]}
    for tokens in TOKENS:
        x_TK = torch.randn(tokens, inputs).to(dtype)
        times = []
        for run in prepared.values():
            check(run(x_TK, 0), x_TK, first)
            times.append(f"{time_ms(run, x_TK, copies):.3f}")
        print(f"| {name} {outputs}x{inputs} | {tokens} | {' | '.join(times)} |", flush=True)


class Quantised(NamedTuple):
    """A mode: random arrays of a layer [N, K], bytes a weight, and the ways to bind them."""

    arrays: Callable[[int, int], tuple[Any, ...]]
    bytes: float
    ways: tuple[Callable[..., Callable[[Tensor], Tensor]], ...]


def int4_arrays(outputs: int, inputs: int) -> tuple[Any, ...]:
    """AWQ's layout, groups of 128 inputs."""
    codes_NB = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    scale_NR = torch.full((outputs, inputs // INT4_GROUP), 0.01).half()
    return codes_NB, scale_NR, None, INT4_BLOCK


def int8_arrays(outputs: int, inputs: int) -> tuple[Any, ...]:
    codes_NK = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return codes_NK, torch.full((outputs,), 0.01)


# Name → mode; PyTorch's operations first, then what is chosen where there is a compiler.
QUANTISED = {
    "int4": Quantised(int4_arrays, 0.5, (cpu_int4.TorchInt4Groups, cpu_int4.bind_groups)),
    "int8": Quantised(int8_arrays, 1, (cpu_int8.TorchInt8Weights, cpu_int8.bind_weights)),
    "w8a8": Quantised(
        lambda outputs, inputs: (*int8_arrays(outputs, inputs), None),
        1,
        (cpu_int8.TorchInt8Activations, cpu_int8.bind_activations),
    ),
}


def measure_quantised(name: str, mode: Quantised) -> None:
    outputs, inputs = SHAPES_NK[name]
    copies = min(MAX_COPIES, int(ROTATED_BYTES / (outputs * inputs * mode.bytes)) + 2)
    layers = [mode.arrays(outputs, inputs) for _ in range(copies)]
    prepared = [[way(*layer) for layer in layers] for way in mode.ways]
    for tokens in TOKENS:
        x_TK = torch.randn(tokens, inputs).to(torch.bfloat16)
        first, second = (products[0](x_TK) for products in prepared)
        assert (first - second).abs().max() <= 2**-6 * first.abs().max(), "wrong result"
        times = [
            f"{time_ms(lambda x, i, products=products: products[i](x), x_TK, copies):.3f}"
            for products in prepared
        ]
        print(f"| {name} {outputs}x{inputs} | {tokens} | {' | '.join(times)} |", flush=True)


def main() -> None:
    wanted = sys.argv[1:] or [*(str(dtype)[6:] for dtype in CANDIDATES), *QUANTISED]
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for kind in (name for name in QUANTISED if name in wanted):
        print(f"\n| {kind} | T | PyTorch | native |\n|---|---|---|---|")
        for name in SHAPES_NK:
            measure_quantised(name, QUANTISED[kind])
    for dtype in (getattr(torch, name) for name in wanted if name not in QUANTISED):
        names = [candidate.__name__ for candidate in CANDIDATES[dtype]]
        print(f"\n| {dtype} | T | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
        for name in SHAPES_NK:
            measure(name, dtype)


if __name__ == "__main__":
    main()
