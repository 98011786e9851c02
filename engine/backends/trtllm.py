"""The TensorRT-LLM backend: NVIDIA's library builds and runs engines from our weight stream.

The one file that imports the library, which is optional.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine import comm
from engine.backends import trtllm_command
from engine.backends.base import BuildPlan, BuildReport
from engine.backends.rank_build import peak_rss
from engine.backends.trtllm_session import Runner, TrtllmSession
from engine.backends.unified_export import export_checkpoint
from engine.engine_file import CONFIG_NAME, EngineWriter, FileRecord, check_size
from engine.errors import EngineError, UserError
from engine.quant import Algorithm
from engine.record import EngineRecord
from engine.weights.unified_pack import Preprocess

# Where the unified checkpoint lies while an engine is built from it, in the output directory.
CHECKPOINT_FOLDER = "trtllm_checkpoint"


class TrtllmBackend:
    """TensorRT engines by TensorRT-LLM; see `engine.backends.base.Backend`."""

    def build(self, plan: BuildPlan, progress: Callable[[int, int], None]) -> BuildReport:
        """Export the checkpoint, run trtllm-build on it, and record what was built.

        The checkpoint is removed after a success and kept after a failure.
        """
        started = time.monotonic()
        tool = trtllm_command.find_tool()
        dialect = trtllm_command.probe(tool)
        record = plan.record
        checkpoint_dir = plan.output_dir / CHECKPOINT_FOLDER
        preprocess = None
        if record.quant.algorithm is Algorithm.W4A16_GPTQ:
            preprocess = find_preprocess()
        exported = replace(plan, companions=())
        export_checkpoint(
            exported, checkpoint_dir, progress, preprocess=preprocess, flag="--output_dir"
        )
        with EngineWriter(plan.output_dir) as writer:
            command = trtllm_command.make_command(
                tool,
                dialect,
                record,
                plan.switches,
                checkpoint_dir=checkpoint_dir,
                output_dir=writer.staging,
                workers=record.mapping.world if plan.parallel else 1,
            )
            staging, final = str(writer.staging), str(plan.output_dir)
            to_repeat = [word.replace(staging, final) for word in command]
            trtllm_command.run(command, to_repeat=to_repeat)
            record = replace(record, files=_list_files(writer.staging, record.mapping.world))
            config = json.loads((writer.staging / CONFIG_NAME).read_text())
            writer.commit({**config, "engine": record.to_dict()}, plan.companions)
        shutil.rmtree(checkpoint_dir)
        seconds = time.monotonic() - started
        return BuildReport(record, seconds, peak_rss(), processes=1)

    def open(
        self,
        engine_dir: Path,
        record: EngineRecord,
        world: comm.World,
        *,
        device: str | None,
        max_attention_window: int | None,
        tuning: bool = False,
        may_share_gpu: bool = True,
    ) -> TrtllmSession:
        if device == "cpu":
            raise UserError(
                f"--device cpu: --engine_dir {engine_dir} is a TensorRT engine, which runs on "
                "NVIDIA GPUs only; build it with the default backend to run it on a CPU"
            )
        for file in record.files:
            check_size(engine_dir / file.name, file)
        library = _load_library()
        runner = _open_runner(library, engine_dir, record, world, max_attention_window)
        return TrtllmSession(replace(record, mapping=record.mapping.at(world.rank)), runner, world)


def find_preprocess() -> Preprocess | None:
    """The library's op that rearranges 4-bit codes for this machine's GPU; None without it."""
    try:
        import tensorrt_llm  # noqa: F401  registers torch.ops.trtllm
    except ImportError:
        return None
    operators = torch.ops.trtllm

    def preprocess(codes_KN: torch.Tensor) -> torch.Tensor:
        packed = operators.pack_int8_tensor_to_packed_int4(codes_KN.contiguous())
        arranged = operators.preprocess_weights_for_mixed_gemm(
            packed, torch.quint4x2, torch.float16
        )
        return arranged.view(torch.float16)

    return preprocess


def _load_library() -> Any:
    try:
        import tensorrt_llm
        import tensorrt_llm.runtime
    except ImportError as error:
        raise UserError(
            f"the engine needs TensorRT-LLM 0.8 … 1.2, which cannot be imported ({error}); "
            f"{trtllm_command.INSTALL}"
        ) from None
    return tensorrt_llm


def _open_runner(
    library: Any,
    engine_dir: Path,
    record: EngineRecord,
    world: comm.World,
    max_attention_window: int | None,
) -> Runner:
    """The C++ runner where the library has one, else the Python one."""
    runtime = library.runtime
    is_cpp = getattr(runtime, "ModelRunnerCpp", None) is not None
    kind = runtime.ModelRunnerCpp if is_cpp else getattr(runtime, "ModelRunner", None)
    if kind is None:
        raise UserError(
            f"tensorrt_llm {getattr(library, '__version__', '')} has no TensorRT engines any more; "
            "install a version below 1.3 (requirements-tensorrt.txt)"
        )
    options = _runner_options(kind, record, world, max_attention_window)
    try:
        runner = kind.from_dir(engine_dir=str(engine_dir), **options)
    except (RuntimeError, AssertionError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EngineError(
            f"--engine_dir {engine_dir} cannot be opened by tensorrt_llm "
            f"{getattr(library, '__version__', '')} ({reason}); build it again with this version "
            "and on this kind of GPU"
        ) from None
    return Runner(runner, is_cpp, _known_settings(library, is_cpp))


def _runner_options(
    kind: type, record: EngineRecord, world: comm.World, max_attention_window: int | None
) -> dict[str, Any]:
    """What the runner of this version takes of the rank, the limits and the window."""
    accepted = inspect.signature(kind.from_dir).parameters
    limits = record.limits
    wanted: dict[str, Any] = {
        "rank": world.rank,
        "max_batch_size": limits.max_batch_size,
        "max_input_len": limits.max_input_len,
        "max_output_len": limits.max_output_len,
        "max_beam_width": limits.max_beam_width,
    }
    options = {name: value for name, value in wanted.items() if name in accepted}
    if max_attention_window is not None:
        name = "max_attention_window_size"
        if name not in accepted:
            raise UserError(
                f"--{name} {max_attention_window}: the {kind.__name__} of this TensorRT-LLM has "
                "no such setting; leave it out"
            )
        # Early versions have one window for all layers, later ones a list that repeats.
        is_list = "list[" in str(accepted[name].annotation).lower()
        options[name] = [max_attention_window] if is_list else max_attention_window
    return options


def _known_settings(library: Any, is_cpp: bool) -> frozenset[str]:
    """Names that the runner's sampling settings have in this version."""
    if is_cpp:
        return frozenset(dir(library.bindings.executor.SamplingConfig))
    return frozenset(field.name for field in dataclasses.fields(library.runtime.SamplingConfig))


def _list_files(folder: Path, world: int) -> tuple[FileRecord, ...]:
    """The rank files that trtllm-build wrote. They carry no checksum: TensorRT has its own."""
    files = []
    for rank in range(world):
        path = folder / f"rank{rank}.engine"
        if not path.exists() or not (folder / CONFIG_NAME).exists():
            raise UserError(
                f"{trtllm_command.TOOL} ended well but wrote no {path.name} with a {CONFIG_NAME}; "
                "run it by hand on the checkpoint of --export_checkpoint to see why"
            )
        files.append(FileRecord(path.name, path.stat().st_size, ""))
    return tuple(files)


backend = TrtllmBackend()
