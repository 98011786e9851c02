"""The same work through this engine and through others, pair by pair on the same machine.

    python -m benchmarks.peers --preset yi-6b --layers 8 --batch_size 1 --input_output_len 512,128

Every side computes the same shape with random weights of its own, the same prompts, and greedily
as many new tokens, in a process of its own. Ours and theirs take turns, so that what disturbs the
machine disturbs both; ratios are of neighbours, and their median is reported (above 1: ours is
faster). transformers and vLLM run in the engine's type whatever the engine's quantisation (vLLM
in fp8 for fp8); llama.cpp in the file type with as many bits. The last line is a JSON document.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmark import dummy_engine
from benchmarks.peering.process import PEERS, Process, open_process
from benchmarks.peering.task import Absent, Task
from engine.comm import World
from utils.benchmarking import report
from utils.benchmarking.dummy import DTYPES, KV_FLAGS, PRESETS, QUANT_FLAGS, DummyEngine
from utils.benchmarking.figures import decode_rate, derive, product_kind
from utils.benchmarking.machine import command
from utils.benchmarking.run import Device, engine_traffic, open_device
from utils.benchmarking.timing import Latency
from utils.benchmarking.workload import Workload, parse_lengths
from utils.cli import Parser, positive_int, run_main


@dataclass(frozen=True)
class Pair:
    """What two sides took for the same work, one right after the other."""

    ours: Latency
    theirs: Latency


def make_parser() -> Parser:
    parser = Parser(prog="peers.py", description="the same work through other engines")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="yi-6b")
    parser.add_argument("--layers", type=positive_int, help="only so many layers")
    parser.add_argument("--quant", choices=tuple(QUANT_FLAGS), default="none")
    parser.add_argument("--kv", choices=tuple(KV_FLAGS), default="none")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--quantize_lm_head", action="store_true", help="our output head as INT8")
    parser.add_argument("--batch_size", type=positive_int, default=1, metavar="N")
    parser.add_argument("--input_output_len", default="128,128", metavar="IN,OUT")
    parser.add_argument("--rounds", type=positive_int, default=5, help="pairs (default: 5)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--work_dir", metavar="DIR", help="for engines, for example /dev/shm")
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="",
        help="append a record (default: the device's file in benchmarks/results)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    shape = (args.preset, args.layers, args.quant, args.kv, args.dtype, args.quantize_lm_head)
    dummy = DummyEngine(*shape)
    work = Workload(args.batch_size, *parse_lengths([args.input_output_len])[0])
    world = World()
    device = open_device(None if args.device == "auto" else args.device, world)
    with dummy_engine(dummy, [work], world=world, work_dir=args.work_dir) as (folder, _):
        task = Task(dummy, work, device.torch_device.type, folder, folder)
        with open_process("ours", task) as ours:
            pairs, peers = compare_all(ours, args.peers, task, args.rounds)
            timed = summarise([pair.ours for pair in pairs] or run_rounds(ours, work, args.rounds))
        record = make_record(task, timed, device, command("-m benchmarks.peers", argv))
    record["peers"] = peers
    if args.json is not None:
        report.append_record(report.results_file(args.json, record), record)
    print(report.latency_table([record]))
    print(f"\n{peers_table(peers)}")
    print(json.dumps(record, ensure_ascii=False))
    return 0


def compare_all(
    ours: Process, names: Sequence[str], task: Task, rounds: int
) -> tuple[list[Pair], dict[str, Any]]:
    """All pairs, and what each peer came to: ratios, or why it is absent."""
    pairs: list[Pair] = []
    peers: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            with open_process(name, task) as theirs:
                found = [run_pair(ours, theirs, task.work) for _ in range(rounds)]
                peers[name] = {"setup": theirs.setup, **compare(found, task.work)}
        except Absent as reason:
            peers[name] = {"absent": str(reason)}
        else:
            pairs += found
    return pairs, peers


def run_pair(ours: Process, theirs: Process, work: Workload) -> Pair:
    return Pair(run_side(ours, work), run_side(theirs, work))


def run_side(side: Process, work: Workload) -> Latency:
    # The longer one first: buffers made for it serve the other.
    whole = side.seconds(work.output_len)
    return Latency(first=side.seconds(1), whole=whole)


def run_rounds(side: Process, work: Workload, rounds: int) -> list[Latency]:
    """Where no peer is there to take turns with."""
    return [run_side(side, work) for _ in range(rounds)]


def summarise(times: Sequence[Latency]) -> Latency:
    return Latency(
        statistics.median(time.first for time in times),
        statistics.median(time.whole for time in times),
    )


def compare(pairs: Sequence[Pair], work: Workload) -> dict[str, Any]:
    """The peer's own figures, and medians of our speed over its."""
    theirs = summarise([pair.theirs for pair in pairs])
    rates = [(decode_rate(pair.ours, work), decode_rate(pair.theirs, work)) for pair in pairs]
    ratios = [own / other for own, other in rates if own is not None and other is not None]
    return {
        "first_token_s": theirs.first,
        "whole_s": theirs.whole,
        "decode_tokens_per_s": decode_rate(theirs, work),
        "tokens_per_s": work.batch * work.output_len / theirs.whole,
        "decode_ratio": statistics.median(ratios) if ratios else None,
        "prefill_ratio": statistics.median(p.theirs.first / p.ours.first for p in pairs),
        "whole_ratio": statistics.median(p.theirs.whole / p.ours.whole for p in pairs),
        "pairs": len(pairs),
    }


def make_record(task: Task, timed: Latency, device: Device, how: str) -> dict[str, Any]:
    """As benchmark.py's of the same work."""
    engine, traffic = engine_traffic(task.engine_dir, World())
    figures = derive(
        timed,
        task.work,
        config=engine.config,
        traffic=traffic,
        limits=device.limits,
        kind=product_kind(engine.quant, engine.dtype, task.device),
    )
    return report.make_record(
        "latency", engine, task.work, figures.to_dict(), device=device, command=how
    )


def peers_table(peers: dict[str, Any]) -> str:
    header = ("peer", "as", "first token ms", "decode tok/s", "decode ×", "prefill ×", "whole ×")
    rows = []
    for name, found in peers.items():
        if "absent" in found:
            rows.append((name, f"absent: {found['absent']}", *["–"] * 5))
            continue
        shown = [
            report.number("first_token_s", factor=1e3)(found),
            report.number("decode_tokens_per_s")(found),
            *(report.number(f"{what}_ratio", spec=".2f")(found) for what in RATIOS),
        ]
        rows.append((name, found["setup"], *shown))
    return report.make_table(header, rows)


RATIOS = ("decode", "prefill", "whole")


if __name__ == "__main__":
    run_main(main)
