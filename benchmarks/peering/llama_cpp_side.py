"""llama.cpp as a side of a comparison, one sequence at a time: through llama-cpp-python, or else a
llama-bench binary on the PATH."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.peering.gguf import write_gguf
from benchmarks.peering.task import Absent, Task
from engine.comm import World
from engine.threads import share_threads
from utils.benchmarking.workload import random_prompts

# Our engine's mode → the file type with as many bits.
FILE_TYPES = {
    "int8": "Q8_0",
    "sq": "Q8_0",
    "fp8": "Q8_0",
    "int4": "Q4_0",
    "int4_awq": "Q4_0",
    "int4_gptq": "Q4_0",
}
PLAIN_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
ALL_LAYERS_ON_GPU = 999


def open_llama_cpp(task: Task) -> Python | Bench:
    """The side that is installed, over a file of random weights that is written now."""
    if task.work.batch != 1:
        raise Absent("llama.cpp is compared at batch 1 only")
    try:
        import llama_cpp
    except ImportError:
        llama_cpp = None
    binary = shutil.which("llama-bench")
    if llama_cpp is None and binary is None:
        raise Absent("neither llama-cpp-python nor llama-bench is installed")
    kind = FILE_TYPES.get(task.dummy.quant, PLAIN_TYPES[task.dummy.dtype])
    path = Path(task.folder) / f"{kind}.gguf"
    write_gguf(path, task.dummy.config, kind)
    if llama_cpp is not None:
        return Python(llama_cpp, task, path, kind)
    return Bench(str(binary), task, path, kind)


class Python:
    """See `task.Side`."""

    def __init__(self, llama_cpp: Any, task: Task, path: Path, kind: str):
        work = task.work
        threads = share_threads(World())
        self._model = llama_cpp.Llama(
            model_path=str(path),
            n_ctx=work.input_len + work.output_len,
            n_batch=work.input_len,
            n_ubatch=min(work.input_len, 512),
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=ALL_LAYERS_ON_GPU if task.device == "cuda" else 0,
            flash_attn=True,
            verbose=False,
        )
        [self._prompt] = random_prompts(1, work.input_len, task.dummy.config.vocab_size)
        self.setup = f"llama-cpp-python {llama_cpp.__version__}, {kind}, {threads} threads"

    def seconds(self, new_tokens: int) -> float:
        start = time.perf_counter()
        self._model.reset()
        self._model.eval(self._prompt)
        for _ in range(new_tokens - 1):
            self._model.eval([self._model.sample(temp=0.0)])
        self._model.sample(temp=0.0)
        return time.perf_counter() - start


class Bench:
    """See `task.Side`. It measures prompts and new tokens, after a prompt, apart, and samples
    nothing."""

    def __init__(self, binary: str, task: Task, path: Path, kind: str):
        threads = share_threads(World())
        layers = ALL_LAYERS_ON_GPU if task.device == "cuda" else 0
        self._command = [binary, "-m", str(path), "-t", str(threads), "-ngl", str(layers)]
        self._command += ["-fa", "1", "-r", "1", "-o", "json"]
        self._input = task.work.input_len
        self.setup = f"llama-bench, {kind}, {threads} threads"

    def seconds(self, new_tokens: int) -> float:
        prompt = self._measure("-p", str(self._input), "-n", "0")
        if new_tokens == 1:
            return prompt
        decoding = ("-p", "0", "-n", str(new_tokens - 1), "-d", str(self._input))
        return prompt + self._measure(*decoding)

    def _measure(self, *flags: str) -> float:
        done = subprocess.run([*self._command, *flags], capture_output=True, text=True, check=True)
        [result] = json.loads(done.stdout)
        return result["avg_ns"] / 1e9
