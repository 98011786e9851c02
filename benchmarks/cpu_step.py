"""Where the time of a decode step goes on this CPU.

    python -m benchmarks.cpu_step [--quant int4_awq] [--layers 8] [--context 128]

An engine of Yi-6B's shape with random weights decodes one sequence. Prints the milliseconds of a
step (medians of many), of its layers and of its head within the step, and of the layers' matrix
products alone, called one after the other on the same weights right after; then what part of a
step is neither these products nor the head. The last line is a JSON document.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmark import dummy_engine
from engine.backends import open_engine
from engine.comm import World
from engine.errors import UserError
from engine.kernels.native import compiled
from engine.sampling import SamplingParams
from utils.benchmarking.dummy import DummyEngine
from utils.benchmarking.workload import Workload, random_prompts
from utils.cli import Parser, positive_int, run_main

NEW_TOKENS = 48
FIRST = SamplingParams(max_new_tokens=1, end_ids=())
REPEATS, ROUNDS = 3, 10


class Timed:
    """A callable, and the seconds that each call of it took."""

    def __init__(self, run: Callable[..., Any]):
        self._run = run
        self.seconds: list[float] = []

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = self._run(*arguments)
        self.seconds.append(time.perf_counter() - start)
        return result

    @property
    def median_ms(self) -> float:
        """Of steps of one token: the prompts' are a few among them."""
        return statistics.median(self.seconds) * 1e3


def measure(folder: str, context: int) -> dict[str, float]:
    session = open_engine(folder, World(), device="cpu")
    network = session._network
    params = [replace(FIRST, max_new_tokens=NEW_TOKENS)]
    prompts = random_prompts(1, context, session.info.config.vocab_size)
    session.generate(prompts, params)
    layers, head = Timed(network._stack), Timed(network._head)
    network._stack, network._head = layers, head
    whole = Timed(lambda tokens: session.generate(prompts, [replace(FIRST, max_new_tokens=tokens)]))
    for _ in range(REPEATS):
        whole(1)
        whole(NEW_TOKENS)
    pairs = zip(whole.seconds[::2], whole.seconds[1::2], strict=True)
    steps = [(longer - first) / (NEW_TOKENS - 1) for first, longer in pairs]
    return {
        "step_ms": 1e3 * statistics.median(steps),
        "layers_ms": layers.median_ms,
        "head_ms": head.median_ms,
        "products_ms": time_products(network),
    }


def time_products(network: Any) -> float:
    """Milliseconds of all layers' products, in a step's order; the median of several rounds."""
    products = [product for block in network._blocks for product in block.products]
    tokens = [torch.randn(1, product.product.inputs).to(network.dtype) for product in products]
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for product, token in zip(products, tokens, strict=True):
            product(token)
        rounds.append(time.perf_counter() - start)
    return statistics.median(rounds[1:]) * 1e3


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="cpu_step.py", description="where the time of a decode step goes")
    parser.add_argument("--quant", choices=("int8", "int4", "int4_awq", "sq"), default="int4_awq")
    parser.add_argument("--layers", type=positive_int, default=8)
    parser.add_argument("--context", type=positive_int, default=128, help="default: %(default)s")
    parser.add_argument("--work_dir", metavar="DIR", help="for the engine, for example /dev/shm")
    args = parser.parse_args(argv)
    if compiled.load("blocks") is None:
        raise UserError("cpu_step measures compiled kernels; install a C++ compiler, or set CXX")
    dummy = DummyEngine("yi-6b", args.layers, args.quant)
    work = Workload(1, args.context, NEW_TOKENS)
    with dummy_engine(dummy, [work], world=World(), work_dir=args.work_dir) as (folder, _):
        found = measure(folder, args.context)
    found["beside"] = 1 - (found["products_ms"] + found["head_ms"]) / found["step_ms"]
    for name, value in found.items():
        print(f"{name:12} {value:8.2f}" if name != "beside" else f"{name:12} {100 * value:7.1f}%")
    print(json.dumps({"quant": args.quant, "layers": args.layers, **found}))
    return 0


if __name__ == "__main__":
    run_main(main)
