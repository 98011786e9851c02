"""What PTX in kernels computes, worked out on the CPU: the interpreter has no assembly."""

from __future__ import annotations

import re
from typing import Any

MOVES = re.compile(r"(\w+)\.[\w.]+ (.*);")


def split_bytes(word: int, is_signed: bool) -> list[int]:
    return [b - 256 * (is_signed and b > 127) for b in (word & 0xFFFFFFFF).to_bytes(4, "little")]


def run_assembly(text: str, results: int, *operands: int) -> list[Any]:
    """The registers that assembly leaves in $0 …, by the PTX manual's meaning of each instruction;
    bf16 and fp16 sums stay pairs of operands."""
    registers: dict[str, Any] = {f"${results + i}": value for i, value in enumerate(operands)}

    def value(name: str) -> Any:
        return registers[name] if name in registers else int(name, 0)

    for line in text.splitlines():
        found = MOVES.match(line)
        if not found or line.startswith(".reg"):
            continue
        operation, (target, *names) = found[1], found[2].split(", ")
        a, *rest = map(value, names)
        if operation == "mov":
            result: Any = a
        elif operation == "prmt":
            pair = (a | rest[0] << 32).to_bytes(8, "little")
            result = sum(pair[rest[1] >> 4 * i & 7] << 8 * i for i in range(4))
        elif operation == "and":
            result = a & rest[0]
        elif operation == "mad":
            result = a * rest[0] + rest[1]
        elif operation.startswith("dp4a"):
            signed_a, signed_b = (kind == "s32" for kind in line.split()[0].split(".")[1:])
            pairs = zip(split_bytes(a, signed_a), split_bytes(rest[0], signed_b), strict=True)
            result = sum(first * second for first, second in pairs) + rest[1]
        elif operation == "or":
            result = a | rest[0]
        elif operation == "xor":
            result = a ^ rest[0]
        elif operation == "sub":
            result = a - rest[0] & 0xFFFFFFFF
        elif operation == "shr":
            result = a >> rest[0]
        elif operation == "lop3":
            assert rest[2] == 0xEA
            result = a & rest[0] | rest[1]
        else:
            assert operation == "fma"
            result = (a, *rest)
        registers[target] = result
    return [registers[f"${i}"] for i in range(results)]


def pack_bytes(values: list[int]) -> int:
    return int.from_bytes(bytes(value & 255 for value in values), "little")
