"""What a backend offers: build an engine directory, and open one for generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from engine.record import EngineRecord

if TYPE_CHECKING:
    from engine.checkpoint.base import Checkpoint
    from engine.comm import World
    from engine.session import Session


@dataclass(frozen=True)
class BuildPlan:
    """Everything a build needs to know.

    `open_checkpoint` is called in every process that reads weights, so it is picklable;
    `switches` are build.py's TensorRT flags for plugin_config and `ignored` says which of them have
    no effect; `companions` are small files (the tokenizer's) that go into the directory unchanged;
    `timing_cache` is a model.cache to take along, if it is there; `targets` are the GPU
    architectures to compile kernels for; `warnings` are what the user should know before the work.
    """

    record: EngineRecord
    output_dir: Path
    open_checkpoint: Callable[[], Checkpoint]
    parallel: bool = False
    switches: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    companions: tuple[Path, ...] = ()
    timing_cache: Path | None = None
    targets: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class BuildReport(NamedTuple):
    """What a finished build can say of itself; `peak_rss` is that of the largest process."""

    record: EngineRecord
    seconds: float
    peak_rss: int
    processes: int


class Backend(Protocol):
    def build(self, plan: BuildPlan, progress: Callable[[int, int], None]) -> BuildReport:
        """Write the engine; `progress(done, total)` is told the bytes written so far."""

    def open(
        self,
        engine_dir: Path,
        record: EngineRecord,
        world: World,
        *,
        device: str | None,
        max_attention_window: int | None,
        tuning: bool = False,
        may_share_gpu: bool = True,
    ) -> Session: ...
