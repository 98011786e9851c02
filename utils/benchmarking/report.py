"""What a benchmark found: Markdown for people, records for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.record import EngineRecord
from utils.benchmarking import machine
from utils.benchmarking.dummy import name_shape
from utils.benchmarking.limits import Limits
from utils.benchmarking.run import Device
from utils.benchmarking.workload import Workload
from utils.output import replace_file

ABSENT = "–"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
Record = Mapping[str, Any]
Column = tuple[str, Callable[[Record], str]]


def make_record(
    task: str,
    engine: EngineRecord,
    work: Workload,
    figures: Record,
    *,
    device: Device,
    command: str,
) -> dict[str, Any]:
    """One workload: what was measured, the figures, and where and with what."""
    return {
        "task": task,
        "model": name_shape(engine.config),
        "layers": engine.config.num_layers,
        "mode": str(engine.quant),
        "dtype": engine.dtype,
        "tp": engine.mapping.tp,
        "pp": engine.mapping.pp,
        "is_dummy": engine.is_dummy,
        "bs": work.batch,
        "isl": work.input_len,
        "osl": work.output_len,
        **figures,
        **describe_machine(device),
        "command": command,
    }


def describe_machine(device: Device) -> dict[str, Any]:
    """The part of a record that is the same for all of a run."""
    return {
        "device": machine.device_name(device.torch_device),
        "threads": device.threads,
        "limits": device.limits.to_dict(),
        "versions": machine.versions(device.torch_device),
        "date": machine.today(),
    }


def results_file(name: str, record: Record) -> Path:
    """`name`, or if it is empty the file of the record's device."""
    return Path(name) if name else RESULTS / f"{machine.file_stem(record['device'])}.json"


def append_record(path: Path, record: Record) -> None:
    """Add to a JSON array in a file, which is made if it is not there."""
    records = read_records(path) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path, "w", encoding="utf-8") as file:
        json.dump([*records, record], file, indent=1, ensure_ascii=False)
        file.write("\n")


def read_records(path: Path) -> list[Record]:
    """UserError for a file that is no array of records."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        records = error
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise UserError(
            f"--json {path} is there and is no list of benchmark records; name another file"
        )
    return records


def limits_table(limits: Limits) -> str:
    rows = [
        ("copy (read + written)", f"{limits.copy / 1e9:,.1f} GB/s"),
        ("read", f"{limits.read / 1e9:,.1f} GB/s"),
        *(
            (f"{kind} matrix product", f"{rate / 1e12:,.2f} {_unit(kind)}")
            for kind, rate in limits.products.items()
        ),
    ]
    return make_table(("limit", "measured"), rows)


def latency_table(records: Sequence[Record]) -> str:
    return _records_table(LATENCY_COLUMNS, records)


def throughput_table(records: Sequence[Record]) -> str:
    return _records_table(THROUGHPUT_COLUMNS, records)


def make_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, columns aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def number(key: str, *, factor: float = 1.0, spec: str = ",.1f") -> Callable[[Record], str]:
    """How a column shows the value `key` of a record."""

    def show(record: Record) -> str:
        value = record.get(key)
        return ABSENT if value is None else format(value * factor, spec)

    return show


def _records_table(columns: Sequence[Column], records: Sequence[Record]) -> str:
    rows = [[show(record) for _, show in columns] for record in records]
    return make_table([name for name, _ in columns], rows)


def _unit(kind: str) -> str:
    return "TOP/s" if kind == "int8" else "TFLOP/s"


_WORK: tuple[Column, ...] = (
    ("model", lambda r: str(r["model"])),
    ("mode", lambda r: f"{r['dtype']}, {r['mode']}" if r["mode"] != "none" else r["dtype"]),
    ("batch", lambda r: str(r["bs"])),
    ("in/out", lambda r: f"{r['isl']}/{r['osl']}"),
)
_MEMORY: Column = ("peak memory GB", number("peak_memory_bytes", factor=1e-9, spec=",.2f"))
LATENCY_COLUMNS = (
    *_WORK,
    ("first token ms", number("first_token_s", factor=1e3)),
    ("decode tok/s", number("decode_tokens_per_s")),
    ("whole tok/s", number("tokens_per_s")),
    ("MB/token", number("bytes_per_token", factor=1e-6)),
    ("GB/s", number("gb_per_s")),
    ("% of bandwidth", number("share", factor=100)),
    ("prefill tok/s", number("prefill_tokens_per_s")),
    ("TFLOP/s", number("prefill_tflops", spec=",.2f")),
    ("% of matmul", number("prefill_share", factor=100)),
    ("prefill % of time", number("prefill_part", factor=100)),
    _MEMORY,
)
THROUGHPUT_COLUMNS = (
    *_WORK,
    ("requests", lambda r: str(r["requests"])),
    ("seconds", number("whole_s", spec=",.2f")),
    ("requests/s", number("requests_per_s", spec=",.2f")),
    ("output tok/s", number("tokens_per_s")),
    ("total tok/s", number("total_tokens_per_s")),
    _MEMORY,
)
