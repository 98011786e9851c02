"""Time of one all-reduce between the ranks of this host.

    mpirun -n 2 python -m benchmarks.allreduce [--device cpu|cuda] [--one_shot] [--sizes 4096 7168]

Prints a Markdown row per type and size: microseconds, the median and the 95th percentile on rank
0, nothing else being computed. On the CPU of single calls; on GPUs of the calls of a CUDA graph,
as a decode step makes them. Two such sums are taken per layer and token.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from engine.backends.torch_engine import pick_device
from engine.comm import Group, World, open_world
from engine.errors import UserError
from engine.threads import share_threads
from utils.cli import Parser, positive_int, run_main

DTYPES = (torch.float32, torch.bfloat16)
WARM_UP = 200
# All-reduces of a captured graph, and how often it is replayed first.
CALLS_A_GRAPH, FIRST_REPLAYS = 50, 5


def time_calls(group: Group, x: torch.Tensor, calls: int) -> list[float]:
    """Sorted microseconds of `calls` all-reduces of `x`, on the CPU."""
    seconds = []
    for _ in range(WARM_UP + calls):
        start = time.perf_counter()
        group.all_reduce(x)
        seconds.append(time.perf_counter() - start)
    return sorted(1e6 * s for s in seconds[WARM_UP:])


def time_graph(group: Group, x: torch.Tensor, calls: int) -> list[float]:
    """As `time_calls` on a GPU: of each replay the mean of its calls."""
    replay = _capture(group, x)
    times = []
    for _ in range(FIRST_REPLAYS + max(1, calls // CALLS_A_GRAPH)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / CALLS_A_GRAPH)
    return sorted(times[FIRST_REPLAYS:])


def _capture(group: Group, x: torch.Tensor) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        group.all_reduce(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = x
        for _ in range(CALLS_A_GRAPH):
            total = group.all_reduce(total)
    return graph.replay


def open_group(world: World, device: str, one_shot: bool) -> tuple[Group, torch.device]:
    """All ranks, and where this one's tensors are."""
    chosen = pick_device(device, world)
    return world.split(world.size, 1, chosen, one_shot=one_shot).tp, chosen


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="allreduce.py", description="time of one all-reduce")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--one_shot", action="store_true", help="small sums in memory that the GPUs share"
    )
    parser.add_argument("--sizes", type=positive_int, nargs="+", default=[4096, 7168])
    parser.add_argument("--calls", type=positive_int, default=2000)
    args = parser.parse_args(argv)
    if args.one_shot and args.device == "cpu":
        raise UserError("--one_shot is for GPUs; add --device cuda or leave it out")

    world = open_world()
    share_threads(world)
    group, device = open_group(world, args.device, args.one_shot)
    measure = time_graph if group.is_capturable and device.type == "cuda" else time_calls
    if world.rank == 0:
        print(f"{type(group).__name__}, {world.size} ranks\n")
        print("| type | elements | median µs | p95 µs |\n|---|---|---|---|")
    for dtype in DTYPES:
        for size in args.sizes:
            times = measure(group, torch.zeros(1, size, dtype=dtype, device=device), args.calls)
            if world.rank == 0:
                median, p95 = times[len(times) // 2], times[len(times) * 95 // 100]
                print(f"| {str(dtype)[6:]} | {size} | {median:.1f} | {p95:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
