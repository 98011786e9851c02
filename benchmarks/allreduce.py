"""Time of one all-reduce between the ranks of this host.

    mpirun -n 2 python -m benchmarks.allreduce [--device cpu|cuda] [--sizes 4096 7168]

Prints a Markdown row per type and size: microseconds, the median and the 95th percentile of
single calls on rank 0, nothing else being computed. Two such sums are taken per layer and token.
"""

from __future__ import annotations

import time

import torch

from engine.comm import Group, open_world
from engine.threads import share_threads
from utils.cli import Parser, positive_int, run_main

DTYPES = (torch.float32, torch.bfloat16)
WARM_UP = 200


def time_calls(group: Group, x: torch.Tensor, calls: int) -> list[float]:
    """Sorted microseconds of `calls` all-reduces of `x`."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    seconds = []
    for _ in range(WARM_UP + calls):
        wait()
        start = time.perf_counter()
        group.all_reduce(x)
        wait()
        seconds.append(time.perf_counter() - start)
    return sorted(1e6 * s for s in seconds[WARM_UP:])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="allreduce.py", description="time of one all-reduce")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=positive_int, nargs="+", default=[4096, 7168])
    parser.add_argument("--calls", type=positive_int, default=2000)
    args = parser.parse_args(argv)

    world = open_world()
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    share_threads(world)
    group = world.split(world.size, 1, device).tp
    if world.rank == 0:
        print(f"{type(group).__name__}, {world.size} ranks\n")
        print("| type | elements | median µs | p95 µs |\n|---|---|---|---|")
    for dtype in DTYPES:
        for size in args.sizes:
            times = time_calls(group, torch.zeros(1, size, dtype=dtype, device=device), args.calls)
            if world.rank == 0:
                median, p95 = times[len(times) // 2], times[len(times) * 95 // 100]
                print(f"| {str(dtype)[6:]} | {size} | {median:.1f} | {p95:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
