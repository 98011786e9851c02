"""What build.py tells its user before and after the work."""

from __future__ import annotations

import logging

from engine.backends.base import BuildPlan, BuildReport
from engine.record import DUMMY_NOTE, EngineRecord
from utils import log

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
logger = logging.getLogger("yi")


def announce(plan: BuildPlan) -> None:
    """Warnings and one line about the flags that do nothing on this backend."""
    record = plan.record
    if record.is_dummy:
        log.warn_loudly(
            f"No checkpoint was given (--model_dir): {DUMMY_NOTE}. Good for sizing and speed only."
        )
    for note in plan.warnings:
        logger.warning(note)
    if plan.ignored:
        logger.info("no effect on the %s backend: %s", record.backend, "; ".join(plan.ignored))
    limits, config = record.limits, record.config
    if limits.max_seq_len > config.max_positions:
        logger.warning(
            "--max_input_len %d plus --max_output_len %d exceed the %d positions the model was "
            "trained for; output past them degrades",
            limits.max_input_len,
            limits.max_output_len,
            config.max_positions,
        )
    logger.info("%s from %s", describe_model(record), record.source)


def describe_model(record: EngineRecord) -> str:
    """One line: size, shape, RoPE."""
    config, rope = record.config, record.config.rope
    scaling = "" if rope.type == "default" else f", {rope.type} scaling ×{rope.factor:g}"
    return (
        f"{config.num_parameters / 1e9:.2f} B parameters: {config.num_layers} layers, width "
        f"{config.hidden_size}, {config.num_heads}/{config.num_kv_heads} heads of "
        f"{config.head_dim}, MLP {config.intermediate_size}, vocabulary {config.vocab_size}, "
        f"rope theta {rope.theta:g}{scaling}, eps {config.rms_norm_eps:g}"
    )


def kv_bytes_per_token(record: EngineRecord) -> int:
    """Bytes the KV cache takes per position over all ranks, replicated heads counted once."""
    config = record.config
    width = 1 if record.quant.kv.value != "none" else DTYPE_BYTES[record.dtype]
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * width


def print_report(plan: BuildPlan, report: BuildReport) -> None:
    """The closing table."""
    record, limits = report.record, report.record.limits
    size = sum(file.bytes for file in record.files)
    rows = [
        ("model", describe_model(record)),
        ("quantisation", f"{record.quant}, {record.dtype}"),
        ("ranks", f"{record.mapping.world} (tp {record.mapping.tp} × pp {record.mapping.pp})"),
        (
            "limits",
            f"batch {limits.max_batch_size}, input {limits.max_input_len}, output "
            f"{limits.max_output_len}, beams {limits.max_beam_width}",
        ),
        ("KV cache", f"{kv_bytes_per_token(record):,} bytes per token"),
        *((file.name, f"{file.bytes / 1e6:,.1f} MB") for file in record.files),
        (
            "build",
            f"{report.seconds:.1f} s ({size / 1e9 / max(report.seconds, 1e-9):.2f} GB/s), peak "
            f"memory {report.peak_rss / 1e6:,.0f} MB in the largest of {report.processes} "
            f"process{'es' * (report.processes > 1)}",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
    print(f"engine written to {plan.output_dir}")


def print_checkpoint(folder: str, report: BuildReport) -> None:
    """The closing lines of an export."""
    record = report.record
    for file in record.files:
        print(f"{file.name}  {file.bytes / 1e6:,.1f} MB")
    print(
        f"{record.quant}, {record.dtype}, tp {record.mapping.tp} × pp {record.mapping.pp}, "
        f"{report.seconds:.1f} s, peak memory {report.peak_rss / 1e6:,.0f} MB"
    )
    print(f"checkpoint written to {folder}; trtllm-build --checkpoint_dir {folder} builds from it")
