"""Compile kernels for GPUs that are not here, and read what the assembler says of them.

    python -m tests.kernels.triton_compile MODULE [capability …] [--first=N]

MODULE has a list CASES, of which the first N are compiled; run through `triton_mode.run_compiled`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

CAPABILITIES = (80, 86, 89, 90, 100, 120)
# Shared memory of one program, bytes: CUDA C++ Programming Guide, technical specifications.
MAX_SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10,
              120: 99 << 10}  # fmt: skip


class Case(NamedTuple):
    """A kernel with the types of its arguments by name ("*bf16", "i32", "fp32"; None is an absent
    pointer) and its constants and options. Pointers and i32 are multiples of 16 but for those in
    `odd`. `capabilities` are those that launch it so."""

    name: str
    kernel: Any
    types: dict[str, str | None]
    constants: dict[str, Any]
    options: dict[str, Any]
    odd: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = CAPABILITIES


class Report(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str


def compile_case(case: Case, capability: int) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {n: None for n, kind in case.types.items() if kind is None}
    # Ampere has no float8 conversions.
    constants |= case.constants | ({"FLOAT8": False} if capability < 89 else {})
    constants = {n: value for n, value in constants.items() if n in case.kernel.arg_names}
    names = case.kernel.arg_names
    assert set(names) == set(case.types) | set(constants), set(names) ^ (
        set(case.types) | set(constants)
    )
    signature = {n: "constexpr" if n in constants else case.types[n] for n in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, n in enumerate(names)
        if n not in case.odd and (signature[n].startswith("*") or signature[n] in ("i32", "i64"))
    }
    source = ASTSource(case.kernel, signature, constants, aligned)
    options = {"num_warps": 4, **case.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = assembler_report(compiled.asm["ptx"], capability)
    return Report(registers, spilled, compiled.metadata.shared, compiled.asm["ptx"])


def assembler_report(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread and bytes spilled, stores and loads together."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"-arch={sm_arch_from_capability(capability)}"]
        result = subprocess.run(
            [*command, str(path), "-o", os.devnull], capture_output=True, text=True, check=True
        )
    spills = re.findall(r"(\d+) bytes spill", result.stderr)
    registers = re.search(r"Used (\d+) registers", result.stderr)
    assert spills and registers, result.stderr
    return int(registers.group(1)), sum(map(int, spills))


def main() -> None:
    module, *rest = sys.argv[1:]
    first = [int(word.removeprefix("--first=")) for word in rest if word.startswith("--first=")]
    capabilities = [int(word) for word in rest if word.isdigit()] or CAPABILITIES
    for case in import_module(module).CASES[: first[0] if first else None]:
        for capability in (c for c in capabilities if c in case.capabilities):
            report = compile_case(case, capability)
            print(
                f"{case.name} sm_{capability}: {report.registers} registers, "
                f"{report.spilled_bytes} bytes spilled, {report.shared_bytes} bytes shared",
                flush=True,
            )
            assert report.shared_bytes <= MAX_SHARED[capability]


if __name__ == "__main__":
    main()
