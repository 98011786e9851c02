"""Writes TensorRT-LLM's unified checkpoint: one safetensors file per rank and config.json."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from engine import unified
from engine.backends.base import BuildPlan, BuildReport
from engine.backends.rank_build import peak_rss, store_plan
from engine.checkpoint.base import Checkpoint
from engine.engine_file import CONFIG_NAME, EngineWriter, FileRecord, RankWriter
from engine.errors import UserError
from engine.quant import Algorithm
from engine.record import EngineRecord
from engine.weights.convert import Piece
from engine.weights.unified import find_algorithm, has_symmetric_codes, stream_unified
from engine.weights.unified_pack import Preprocess

FLAG = "--export_checkpoint"
NO_PADDING = 1


def export_checkpoint(
    plan: BuildPlan,
    folder: Path,
    progress: Callable[[int, int], None],
    *,
    preprocess: Preprocess | None = None,
    flag: str = FLAG,
) -> BuildReport:
    """Write the checkpoint of `plan` to `folder`: all of it, or nothing after a failure.

    `preprocess` is the library's op, without which GPTQ weights are refused; `flag` named the
    folder. Raises UserError for what TensorRT-LLM's checkpoint has no form for.
    """
    started, record = time.monotonic(), plan.record
    _check(record, folder, flag)
    with plan.open_checkpoint() as checkpoint:
        if preprocess is None:
            _refuse_gptq(record, checkpoint)
        algorithm = find_algorithm(checkpoint, store_plan(record))
        config = unified.write_config(
            record.config,
            record.dtype,
            record.quant,
            record.mapping,
            embedding_dim=record.embedding_dim,
            algorithm=algorithm,
        )
        ranks = list(record.mapping.ranks())
        pieces = list(stream_unified(checkpoint, store_plan(record), ranks, preprocess=preprocess))
        total = sum(piece.nbytes for piece in pieces)
        with EngineWriter(folder, flag) as writer:
            writer.require_space(total)
            files = _write(pieces, writer.staging, lambda done: progress(done, total))
            writer.commit(config, plan.companions)
    _drop_other_ranks(folder, len(ranks))
    seconds = time.monotonic() - started
    return BuildReport(replace(record, files=tuple(files)), seconds, peak_rss(), processes=1)


def _write(
    pieces: Sequence[Piece], staging: Path, progress: Callable[[int], None]
) -> list[FileRecord]:
    writers = {}
    for rank in sorted({piece.rank for piece in pieces}):
        own = [piece for piece in pieces if piece.rank == rank]
        path = staging / unified.rank_file(rank)
        writers[rank] = RankWriter(path, own, {"format": "pt"}, alignment=NO_PADDING)
    done = 0
    try:
        for piece in pieces:
            writers[piece.rank].write(piece, piece.blocks())
            done += piece.nbytes
            progress(done)
        return [writer.close() for writer in writers.values()]
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise


def _check(record: EngineRecord, folder: Path, flag: str) -> None:
    """Refusals that need no weights."""
    config, mapping = record.config, record.mapping
    if record.quant.head is not Algorithm.NONE:
        raise UserError(
            "--quantize_lm_head is the torch backend's only: checkpoints for TensorRT-LLM are "
            "written with lm_head in full precision; leave it out"
        )
    if record.is_dummy:
        raise UserError(f"{flag} {folder} needs weights to write; name a checkpoint as --model_dir")
    if config.num_layers % mapping.pp:
        raise UserError(
            f"--pp_size {mapping.pp} does not divide the model's {config.num_layers} layers, as "
            "TensorRT-LLM needs; choose a divisor"
        )
    try:
        found = json.loads((folder / CONFIG_NAME).read_text())
    except (OSError, ValueError):
        return
    if not isinstance(found, dict) or "architecture" not in found:
        raise UserError(
            f"{flag} {folder} holds an engine or another checkpoint, whose {CONFIG_NAME} would be "
            "replaced; choose another directory"
        )


def _refuse_gptq(record: EngineRecord, checkpoint: Checkpoint) -> None:
    if record.quant.algorithm is not Algorithm.W4A16_GPTQ:
        return
    way_out = "export on a machine with tensorrt_llm and the GPU it is for"
    if has_symmetric_codes(checkpoint):
        way_out += (
            ", or as AWQ, whose form these weights fit: --use_weight_only --weight_only_precision "
            f"int4_awq --group_size {record.quant.group_size}"
        )
    raise UserError(
        "TensorRT-LLM's W4A16_GPTQ checkpoint holds weights that its own operator rearranged for "
        f"one class of GPU, and tensorrt_llm is not installed here; {way_out}"
    )


def _drop_other_ranks(folder: Path, world: int) -> None:
    """Remove the files of an earlier checkpoint with more ranks."""
    while (path := folder / unified.rank_file(world)).exists():
        path.unlink()
        world += 1
