"""Backends by name, and the one door to a built engine."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from engine.backends.trtllm_record import find_foreign, read_foreign
from engine.engine_file import CONFIG_NAME, read_config
from engine.errors import EngineError, UserError
from engine.record import EngineRecord

if TYPE_CHECKING:
    from engine.backends.base import Backend
    from engine.comm import World
    from engine.session import Session

# Name → module that defines `backend`; imported when chosen.
BACKENDS = {"torch": "engine.backends.torch_engine", "tensorrt_llm": "engine.backends.trtllm"}


def get_backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise UserError(
            f"--backend {name} is not available in this version; use {' or '.join(BACKENDS)}"
        )
    return import_module(BACKENDS[name]).backend


def read_record(engine_dir: str | Path) -> EngineRecord:
    """The record of an engine directory; EngineError if it is none or of another version.

    Engines that trtllm-build itself wrote are recognised, too.
    """
    folder = Path(engine_dir)
    if (foreign := find_foreign(folder)) is not None:
        return read_foreign(foreign, folder)
    return EngineRecord.from_dict(read_config(folder)["engine"], str(folder / CONFIG_NAME))


def open_engine(
    engine_dir: str | Path,
    world: World,
    *,
    device: str | None = None,
    max_attention_window: int | None = None,
    tuning: bool = False,
    may_share_gpu: bool = True,
) -> Session:
    """Load this rank's part of an engine.

    `device` is 'cpu', 'cuda' or None (a GPU if there is one); `max_attention_window` limits
    attention to that many last positions; with `tuning` the first run on a GPU measures which
    kernels are fastest there; `may_share_gpu` allows several ranks on one GPU.

    Raises EngineError for a damaged engine, for one that was built for another number of ranks,
    and UserError for a device that is not there or may not be shared.
    """
    record = read_record(engine_dir)
    _check_world(record, world, Path(engine_dir))
    if max_attention_window is not None and max_attention_window < 1:
        raise UserError(
            f"--max_attention_window_size {max_attention_window} must be at least 1 position"
        )
    return get_backend(record.backend).open(
        Path(engine_dir),
        record,
        world,
        device=device,
        max_attention_window=max_attention_window,
        tuning=tuning,
        may_share_gpu=may_share_gpu,
    )


def _check_world(record: EngineRecord, world: World, engine_dir: Path) -> None:
    if world.size == record.mapping.world:
        return
    ranks = record.mapping.world
    launch = f"mpirun -n {ranks} python" if ranks > 1 else "python"
    raise EngineError(
        f"--engine_dir {engine_dir} was built for {ranks} rank{'s' * (ranks > 1)} "
        f"(tp {record.mapping.tp} × pp {record.mapping.pp}) and {world.size} "
        f"{'are' if world.size > 1 else 'is'} running; start it as: {launch} run.py "
        f"--engine_dir {engine_dir} …"
    )
