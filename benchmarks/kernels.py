"""Linear kernels on the real matrices, against the card's limits measured in the same run.

    python -m benchmarks.kernels [--ops …] [--m 1 8 64 512] [--model yi-34b] [--tune] [--no-pdl]

Prints the copy bandwidth and the bf16 matmul rate first, then a row per operation, matrix and
batch: microseconds, GB/s of weights (and their share of the copy bandwidth), TFLOP/s, and how
many times faster than cuBLAS in bf16. A time is the least of several replays of a CUDA graph
that runs over copies of the weights larger than the second-level cache. Before it is taken, the
result is compared with PyTorch's fp32 on the same shape; a wrong one has no time. --tune measures
all candidates and prints each choice; --fused adds norm, gate and residual as a block has them.
The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import quantized_reference, registry
from engine.kernels.triton import _launch, _tactics
from engine.kernels.triton._tuning import replay_us, tune
from engine.kernels.triton.rms_norm import rms_norm
from engine.kernels.triton.silu_mul import silu_mul
from utils.benchmarking.limits import measure_limits

MATRICES = {
    "yi-6b": {
        "qkv": (5120, 4096),
        "out": (4096, 4096),
        "gate_up": (22016, 4096),
        "down": (4096, 11008),
        "head": (64000, 4096),
    },
    "yi-34b": {
        "qkv": (9216, 7168),
        "out": (7168, 7168),
        "gate_up": (40960, 7168),
        "down": (7168, 20480),
        "head": (64000, 7168),
    },
}
OPS = ("linear", *registry.QUANTISED_LINEARS)
GROUP, BLOCK = 128, 64
# A time counts if the greatest error is less than this part of the greatest value: bf16 rounds
# results to 1/256, and weights too where they are widened.
MAX_ERROR = 0.016
ROTATED_BYTES = 200e6
EPS = 1e-5


@dataclass(frozen=True)
class Result:
    op: str
    matrix: str
    tokens: int
    kernel: str
    us: float
    gb_s: float
    copy_share: float
    tflop_s: float
    over_cublas: float
    error: float


def make_weights(op: str, outputs: int, inputs: int) -> tuple[Any, ...]:
    """Random arrays of the operation; scales as of weights of variance 1 / inputs."""
    device, step = "cuda", inputs**-0.5
    if op == "linear":
        return (torch.randn(outputs, inputs, dtype=torch.bfloat16, device=device).mul_(step),)
    scale_N = torch.rand(outputs, device=device).add_(0.5).mul_(step / 73)
    if op in _tactics.NIBBLES:
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
        if op == "linear_int4":
            return codes, scale_N * (73 / 4.6)
        groups = (outputs, inputs // GROUP)
        scale_NR = torch.rand(groups, device=device).add_(0.5).mul_(step / 4.6).half()
        zero_NR = torch.randint(0, 16, groups, dtype=torch.uint8, device=device)
        return codes, scale_NR, zero_NR, BLOCK
    codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
    if op == "linear_int8":
        return codes, scale_N
    if op == "linear_w8a8":
        return codes, scale_N, None
    # One scale for all, as calibrated engines have: cuBLAS' case for many tokens.
    uniform_N = torch.full((outputs,), step / 73, device=device)
    input_scale = torch.full((1,), 4 / 448, device=device)
    return codes.half().to(torch.float8_e4m3fn), uniform_N, input_scale


def reference(op: str, x_TK: Tensor, arrays: tuple[Any, ...]) -> Tensor:
    """fp32, of the op's contract."""
    if op == "linear":
        return F.linear(x_TK.float(), arrays[0].float())
    return getattr(quantized_reference, op)(x_TK.float(), *arrays).float()


def relative_error(y_TN: Tensor, truth_TN: Tensor) -> float:
    assert y_TN.isfinite().all(), "not finite"
    return ((y_TN.float() - truth_TN).abs().max() / truth_TN.abs().max()).item()


def nbytes(arrays: tuple[Any, ...]) -> int:
    return sum(array.nbytes for array in arrays if isinstance(array, Tensor))


def copies_of(arrays: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The arrays and clones, together larger than any second-level cache."""
    count = max(2, int(ROTATED_BYTES / nbytes(arrays)) + 1)
    clones = [
        tuple(a.clone() if isinstance(a, Tensor) else a for a in arrays) for _ in range(count - 1)
    ]
    return [arrays, *clones]


def limits() -> tuple[float, float]:
    """Copy bandwidth in GB/s, read and written bytes together, and bf16 TFLOP/s."""
    found = measure_limits(torch.device("cuda"))
    return found.bandwidth / 1e9, found.products["bfloat16"] / 1e12


def fusing(matrix: str, tokens: int, outputs: int, inputs: int) -> dict[str, Any]:
    """What a block has around the matrix."""
    norm = torch.rand(inputs, dtype=torch.bfloat16, device="cuda"), EPS
    residual = torch.randn(tokens, outputs, dtype=torch.bfloat16, device="cuda")
    return {
        "qkv": {"norm": norm},
        "head": {"norm": norm},
        "gate_up": {"norm": norm, "is_gated": True},
        "out": {"residual_TN": residual},
        "down": {"residual_TN": residual},
    }[matrix]


def compose(
    product: Callable[[Tensor], Tensor],
    x_TK: Tensor,
    norm: tuple[Tensor, float] | None = None,
    is_gated: bool = False,
    residual_TN: Tensor | None = None,
) -> Tensor:
    """The same by an operation after the other."""
    y = product(x_TK if norm is None else rms_norm(x_TK, *norm))
    y = silu_mul(y) if is_gated else y
    return y if residual_TN is None else y + residual_TN


class Bench:
    """One matrix: what cuBLAS takes for it, and the operations' results."""

    def __init__(self, args: argparse.Namespace, copy_gb_s: float):
        self.args, self.copy_gb_s = args, copy_gb_s
        self.results: list[Result] = []

    def matrix(self, name: str, outputs: int, inputs: int) -> None:
        wide = copies_of(make_weights("linear", outputs, inputs))
        batches = {
            tokens: torch.randn(tokens, inputs, dtype=torch.bfloat16, device="cuda")
            for tokens in self.args.m
        }
        cublas_us = {
            tokens: replay_us([lambda w=w, x=x: F.linear(x, w[0]) for w in wide])
            for tokens, x in batches.items()
        }
        for tokens, us in cublas_us.items():
            self._report("cublas", name, tokens, "library", us, us, wide[0], (outputs, inputs), 0.0)
        del wide
        for op in self.args.ops:
            torch.cuda.empty_cache()
            rotated = copies_of(make_weights(op, outputs, inputs))
            products = [registry.bind(op, *arrays) for arrays in rotated]
            for tokens, x in batches.items():
                self._measure(op, name, x, rotated[0], products, cublas_us[tokens])

    def _measure(
        self,
        op: str,
        name: str,
        x_TK: Tensor,
        arrays: tuple[Any, ...],
        products: Sequence[Any],
        cublas_us: float,
    ) -> None:
        weights = products[0].weights
        shape = (weights.outputs, weights.inputs)
        if self.args.tune:
            runs = [lambda p=p: p(x_TK) for p in products]
            tune((op, len(x_TK), *shape), runs, lambda line: print(f"    {line}", flush=True))
        config = products[0].choose(x_TK)
        kernel = "/".join(map(str, config))
        error = relative_error(products[0](x_TK), reference(op, x_TK, arrays))
        if error > MAX_ERROR:
            print(f"{op} {name} {len(x_TK)} {kernel}: WRONG, error {error:.2e}", flush=True)
            return
        us = replay_us([lambda p=p: p(x_TK) for p in products])
        self._report(op, name, len(x_TK), kernel, us, cublas_us, arrays, shape, error)
        if self.args.fused:
            self._measure_fused(op, name, x_TK, arrays, products, cublas_us)

    def _measure_fused(
        self,
        op: str,
        name: str,
        x_TK: Tensor,
        arrays: tuple[Any, ...],
        products: Sequence[Any],
        cublas_us: float,
    ) -> None:
        weights = products[0].weights
        shape = (weights.outputs, weights.inputs)
        around = fusing(name, len(x_TK), *shape)
        composed = compose(products[0], x_TK, **around).float()
        # Last, since a result may take over the residual's memory.
        error = relative_error(products[0].fused(x_TK, **around), composed)
        # Both sides are rounded, the composed one several times.
        if error > 2 * MAX_ERROR:
            print(f"{op} {name} {len(x_TK)} fused: WRONG, error {error:.2e}", flush=True)
            return
        for label, runs in (
            ("fused", [lambda p=p: p.fused(x_TK, **around) for p in products]),
            ("composed", [lambda p=p: compose(p, x_TK, **around) for p in products]),
        ):
            us = replay_us(runs)
            self._report(op, name, len(x_TK), label, us, cublas_us, arrays, shape, error)

    def _report(
        self,
        op: str,
        name: str,
        tokens: int,
        kernel: str,
        us: float,
        cublas_us: float,
        arrays: tuple[Any, ...],
        shape: tuple[int, int],
        error: float,
    ) -> None:
        gb_s = nbytes(arrays) / us / 1e3
        tflop_s = 2 * tokens * shape[0] * shape[1] / us / 1e6
        result = Result(
            op, name, tokens, kernel, us, gb_s, gb_s / self.copy_gb_s, tflop_s, cublas_us / us,
            error,
        )  # fmt: skip
        self.results.append(result)
        print(
            f"{op:18} {name:8} {tokens:5} {us:9.2f} us {gb_s:7.0f} GB/s "
            f"{100 * result.copy_share:5.1f} % {tflop_s:7.1f} TFLOP/s "
            f"{result.over_cublas:5.2f}x  err {error:.1e}  {kernel}",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--m", nargs="+", type=int, default=[1, 8, 64, 512], help="tokens")
    parser.add_argument("--model", choices=MATRICES, default="yi-6b")
    parser.add_argument("--matrices", nargs="+", help="some of the model's (default: all)")
    parser.add_argument("--tune", action="store_true", help="measure all candidates first")
    parser.add_argument("--fused", action="store_true", help="time fused and composed forms too")
    parser.add_argument(
        "--pdl",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="programmatic dependent launch",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a GPU")
    torch.manual_seed(0)
    _launch.PDL = args.pdl
    copy_gb_s, bf16_tflop_s = limits()
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, PDL {'on' if args.pdl else 'off'}")
    print(f"copy {copy_gb_s:.0f} GB/s, bf16 matmul {bf16_tflop_s:.0f} TFLOP/s", flush=True)
    bench = Bench(args, copy_gb_s)
    with torch.inference_mode():
        for name, shape in MATRICES[args.model].items():
            if args.matrices is None or name in args.matrices:
                bench.matrix(name, *shape)
    document = {
        "card": card,
        "torch": torch.__version__,
        "command": sys.argv[1:],
        "copy_gb_s": copy_gb_s,
        "bf16_tflop_s": bf16_tflop_s,
        "results": [asdict(result) for result in bench.results],
        "tactics": _tactics.measured(),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
