"""A side of a comparison in a process of its own: what it loads and breaks is nobody else's.

The parent writes a number of new tokens a line and reads an answer a line, both JSON:

    python -m benchmarks.peering.process NAME TASK
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import IO, Any

from benchmarks.peering.task import Absent, Side, Task

# Name → module and what opens the side.
SIDES = {
    "ours": ("benchmarks.peering.ours", "Ours"),
    "transformers": ("benchmarks.peering.hf", "Transformers"),
    "llama.cpp": ("benchmarks.peering.llama_cpp_side", "open_llama_cpp"),
    "vllm": ("benchmarks.peering.vllm_side", "Vllm"),
}
PEERS = tuple(name for name in SIDES if name != "ours")

SECONDS_TO_END = 20


class Process:
    """The parent's end. `setup` says how the side runs."""

    def __init__(self, name: str, child: subprocess.Popen[str]):
        self.name, self._child = name, child
        self.setup = str(self._answer()["setup"])

    def seconds(self, new_tokens: int) -> float:
        assert self._child.stdin is not None
        self._child.stdin.write(f"{new_tokens}\n")
        self._child.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise Absent(f"its process ended with status {self._child.wait()}, see above")
        answer = json.loads(line)
        if "absent" in answer:
            raise Absent(answer["absent"])
        return answer


@contextmanager
def open_process(name: str, task: Task) -> Iterator[Process]:
    """Raises Absent if the side cannot take part, at once or later."""
    command = [sys.executable, "-m", "benchmarks.peering.process", name, task.to_json()]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        yield Process(name, child)
    finally:
        _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.close()
    try:
        child.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def serve(side: Side, requests: IO[str], answer: Callable[[dict], None]) -> None:
    """Every length runs once before it is timed: what is made then is made once."""
    answer({"setup": side.setup})
    warm: set[int] = set()
    for line in requests:
        new_tokens = int(line)
        if new_tokens not in warm:
            side.seconds(new_tokens)
            warm.add(new_tokens)
        answer({"seconds": side.seconds(new_tokens)})


def main(name: str, task: str) -> None:
    # Libraries print what they like; the parent's pipe is for answers only.
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(value: dict) -> None:
        pipe.write(json.dumps(value) + "\n")

    module, opener = SIDES[name]
    try:
        side = getattr(import_module(module), opener)(Task.from_json(task))
    except Absent as reason:
        answer({"absent": str(reason)})
        return
    serve(side, sys.stdin, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
