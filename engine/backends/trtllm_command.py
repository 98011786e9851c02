"""trtllm-build's command line: build.py's old flags in the words of the version that is installed.

Versions are told apart by what their --help lists. Imports nothing of the library.
"""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError
from engine.quant import Algorithm
from engine.record import EngineRecord

TOOL = "trtllm-build"
INSTALL = (
    "install requirements-tensorrt.txt on a machine with an NVIDIA GPU (docs/migration.md), or "
    "leave --backend out, since the default backend needs none of it"
)
logger = logging.getLogger("yi")


class Option(NamedTuple):
    """How a switch of build.py is said now: by the first of `flags` that the version has.

    `value` is what follows a flag that takes a value: 'enable', the engine's dtype for '{dtype}',
    the switch's own for '{value}', the output directory for '{output}'.
    """

    switch: str
    flags: tuple[str, ...]
    value: str = "enable"


OPTIONS = (
    Option("use_gemm_plugin", ("--gemm_plugin",), "{dtype}"),
    Option("use_rmsnorm_plugin", ("--rmsnorm_plugin",), "{dtype}"),
    Option("enable_context_fmha", ("--context_fmha",)),
    Option("enable_context_fmha_fp32_acc", ("--context_fmha_fp32_acc",)),
    Option("multi_block_mode", ("--multi_block_mode",)),
    Option("remove_input_padding", ("--remove_input_padding",)),
    Option("use_fused_mlp", ("--use_fused_mlp",)),
    Option("use_custom_all_reduce", ("--use_custom_all_reduce",)),
    Option("strongly_typed", ("--strongly_typed",)),
    Option("builder_opt", ("--builder_opt",), "{value}"),
    Option("visualize", ("--visualize_network",), "{output}"),
    Option("enable_debug_output", ("--enable_debug_output",)),
    Option("disable_weight_only_quant_plugin", ()),
)


@dataclass(frozen=True)
class Dialect:
    """What a `trtllm-build --help` lists: flag → whether it takes a value."""

    flags: Mapping[str, bool]

    @classmethod
    def from_help(cls, text: str) -> Dialect:
        """Read argparse's list of options, where a flag is followed by its value's name or choices,
        or by neither; what descriptions mention is further to the right."""
        found: dict[str, bool] = {}
        for line in re.findall(r"^ {1,4}-.*$", text, re.MULTILINE):
            for flag, value in re.findall(r"(--\w+)(?: (\{|\[?[A-Z][A-Z_]+))?", line):
                found[flag] = found.get(flag, False) or bool(value)
        return cls(found)

    def has(self, flag: str) -> bool:
        return flag in self.flags

    def say(self, flag: str, value: str) -> list[str]:
        return [flag, value] if self.flags[flag] else [flag]


def find_tool() -> str:
    """The path of trtllm-build; UserError where it is not installed."""
    tool = shutil.which(TOOL)
    if tool is None:
        raise UserError(
            "--backend tensorrt_llm builds with TensorRT-LLM 0.8 … 1.2, whose trtllm-build is not "
            f"on PATH; {INSTALL}"
        )
    return tool


def probe(tool: str) -> Dialect:
    """What this version of trtllm-build understands; UserError if it is none from 0.8 to 1.2."""
    asked = subprocess.run([tool, "--help"], capture_output=True, text=True, check=False)
    dialect = Dialect.from_help(asked.stdout)
    is_known = dialect.has("--max_output_len") or dialect.has("--max_seq_len")
    if asked.returncode or not dialect.has("--checkpoint_dir") or not is_known:
        last = (asked.stderr.strip().splitlines() or ["no text"])[-1]
        raise UserError(
            f"{tool} --help ended with status {asked.returncode} and is not that of TensorRT-LLM "
            f"0.8 … 1.2 ({last}); {INSTALL}"
        )
    return dialect


def make_command(
    tool: str,
    dialect: Dialect,
    record: EngineRecord,
    switches: Mapping[str, Any],
    *,
    checkpoint_dir: Path,
    output_dir: Path,
    workers: int,
) -> list[str]:
    """The command that builds `record`'s engine; every limit is given, none left to a default.

    Logs the switches that the version has no flag for.
    """
    command = [tool, "--checkpoint_dir", str(checkpoint_dir), "--output_dir", str(output_dir)]
    for flag, value in _limits(dialect, record).items():
        command += [flag, str(value)]
    command += ["--workers", str(workers)] if dialect.has("--workers") else []
    command += _cache_flags(dialect, record)
    if record.limits.gather_all_token_logits:
        command += dialect.say("--gather_all_token_logits", "enable")
    # The plugin's type has to be the model's, whatever the old flag's value was.
    command += ["--gpt_attention_plugin", record.dtype]
    command += _timing_cache(dialect, switches, output_dir)
    absent = []
    for option in OPTIONS:
        if switches.get(option.switch) in (None, False):
            continue
        flag = next((flag for flag in option.flags if dialect.has(flag)), None)
        is_dropped = option.switch == "use_gemm_plugin" and record.quant.algorithm is Algorithm.FP8
        if flag is None or is_dropped:
            absent.append(f"--{option.switch}")
            continue
        value = option.value.format(
            dtype=record.dtype, value=switches[option.switch], output=output_dir
        )
        command += dialect.say(flag, value)
    if absent:
        logger.info("without a counterpart in this trtllm-build: %s", ", ".join(absent))
    return command


def _limits(dialect: Dialect, record: EngineRecord) -> dict[str, int]:
    limits = record.limits
    packed = limits.max_batch_size * max(limits.max_input_len, limits.max_beam_width)
    values = {
        "--max_batch_size": limits.max_batch_size,
        "--max_input_len": limits.max_input_len,
        "--max_beam_width": limits.max_beam_width,
        "--max_num_tokens": limits.max_num_tokens or packed,
    }
    if dialect.has("--max_seq_len"):
        return values | {"--max_seq_len": limits.max_seq_len}
    return values | {"--max_output_len": limits.max_output_len}


def _cache_flags(dialect: Dialect, record: EngineRecord) -> list[str]:
    if not record.limits.paged_kv_cache:
        return []
    if dialect.has("--kv_cache_type"):
        command = ["--kv_cache_type", "paged"]
    else:
        command = dialect.say("--paged_kv_cache", "enable")
    return [*command, "--tokens_per_block", str(record.limits.tokens_per_block)]


def _timing_cache(dialect: Dialect, switches: Mapping[str, Any], output_dir: Path) -> list[str]:
    """Tactics are read from --timing_cache, if it exists, and kept beside the engine."""
    command = []
    given = switches.get("timing_cache")
    if given and Path(given).exists() and dialect.has("--input_timing_cache"):
        command += ["--input_timing_cache", str(given)]
    if dialect.has("--output_timing_cache"):
        command += ["--output_timing_cache", str(output_dir / "model.cache")]
    return command


def run(command: Sequence[str], *, to_repeat: Sequence[str]) -> None:
    """Run the command and log its lines as they come.

    Raises UserError with its last line and the command `to_repeat` if it fails.
    """
    logger.info("%s", shlex.join(command))
    last = "no output"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip():
                    last = line.strip()
                    logger.info("%s", line.rstrip())
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise UserError(
            f"{TOOL} ended with status {process.returncode} ({last}); the checkpoint is kept, and "
            f"this repeats the step: {shlex.join(to_repeat)}"
        )
