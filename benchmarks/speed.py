"""README's speed tables, from the records of benchmarks/results.

    python -m benchmarks.speed [--write README.md]

A table a device: what `benchmark.py` and `benchmarks.peers` measured there last, a row a workload,
with its share of the limits of the same run. Where other engines did the same work, the ratios of
neighbouring runs say how many times faster ours was.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.marks import write_between
from utils.benchmarking.report import RESULTS, Column, Record, make_table, number, read_records
from utils.cli import Parser, run_main

MARK = "speed tables"
# What tells one workload from another.
WORKLOAD = ("task", "model", "mode", "dtype", "tp", "pp", "bs", "isl", "osl")


def show_peers(record: Record) -> str:
    """'llama.cpp Q4_0: 1.02 / 1.20' for decoding and prompts."""
    parts = []
    for name, found in (record.get("peers") or {}).items():
        if "absent" in found:
            continue
        ratios = [found[key] for key in ("decode_ratio", "prefill_ratio")]
        shown = " / ".join("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        parts.append(f"{shorten(name, found['setup'])}: {shown}")
    return "; ".join(parts) or "–"


def shorten(name: str, setup: str) -> str:
    """A peer with what says which of its forms ran."""
    forms = [word for word in setup.replace(",", "").split() if word in FORMS]
    return " ".join([name, *forms])


FORMS = ("BF16", "Q8_0", "Q4_0", "compiled", "fp8")


COLUMNS: tuple[Column, ...] = (
    ("model", lambda r: str(r["model"]) + (f", tp {r['tp']}" if r["tp"] > 1 else "")),
    ("mode", lambda r: r["dtype"] if r["mode"] == "none" else r["mode"]),
    ("batch", lambda r: str(r["bs"])),
    ("in/out", lambda r: f"{r['isl']}/{r['osl']}"),
    ("decode tok/s", number("decode_tokens_per_s")),
    ("% of bandwidth", number("share", factor=100, spec=".0f")),
    ("first token ms", number("first_token_s", factor=1e3, spec=",.0f")),
    ("prompt: % of matmul", number("prefill_share", factor=100, spec=".0f")),
    ("× others: decode / prompt", show_peers),
)


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of every workload, in the order of the first."""
    found: dict[tuple[Any, ...], Record] = {}
    for record in records:
        if record["task"] == "latency":
            found[tuple(record[key] for key in WORKLOAD)] = record
    return list(found.values())


def device_table(records: Sequence[Record]) -> str:
    """A device's heading and table; all records are of one device."""
    newest = latest(records)
    limits, versions = newest[-1]["limits"], newest[-1]["versions"]
    bandwidth = max(limits["copy"], limits["read"] if limits["device"] == "cpu" else 0)
    heading = (
        f"**{newest[-1]['device']}** ({newest[-1]['date']}, torch {versions['torch']}"
        f"{', ' + str(newest[-1]['threads']) + ' threads' if limits['device'] == 'cpu' else ''}): "
        f"{bandwidth / 1e9:,.0f} GB/s, bf16 matrix product "
        f"{limits['products']['bfloat16'] / 1e12:,.2f} TFLOP/s."
    )
    rows = [[show(record) for _, show in COLUMNS] for record in newest]
    return f"{heading}\n\n{make_table([name for name, _ in COLUMNS], rows)}"


def tables(folder: Path = RESULTS) -> str:
    """GPUs first."""
    devices = [read_records(path) for path in sorted(folder.glob("*.json"))]
    devices.sort(key=lambda records: records[0]["limits"]["device"] == "cpu")
    return "\n\n".join(device_table(records) for records in devices)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="speed.py", description="README's speed tables")
    parser.add_argument("--write", metavar="FILE", help="put them between the file's marks")
    args = parser.parse_args(argv)
    found = tables()
    print(found)
    if args.write:
        write_between(Path(args.write), MARK, found)
        print(f"written into {args.write}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_main(main)
