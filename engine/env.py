"""Environment variables. No other module reads or sets them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError

# Where a launcher tells a process its rank and the number of ranks.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),  # MVAPICH
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI, srun --mpi=pmi2
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),  # srun --mpi=pmix
)

# Up to this size Open MPI copies a message through shared memory at once instead of agreeing on
# the transfer first. 4 KiB is its default; a row of activations is 16 KiB and more, and reducing
# one takes half the time this way (benchmarks/allreduce.py).
EAGER_BYTES = 64 * 1024


# How prompts meet 4-bit weights in groups on a CPU: "exact", or "int8", rounded to 8 bits.
INT4_PROMPTS = "YI_ENGINES_INT4_PROMPTS"


class Launch(NamedTuple):
    """What the launcher says of this process; `ranks` is None where it does not say."""

    rank: int
    ranks: int | None


def launch() -> Launch | None:
    """This process's place among the ranks of a job, or None without a launcher."""
    for rank_name, ranks_name in _LAUNCHERS:
        rank, ranks = _read_count(rank_name), _read_count(ranks_name)
        # A batch script sees the number of tasks and has no rank, so the rank decides.
        if rank is not None and (ranks is None or rank < ranks):
            return Launch(rank, ranks)
    return None


def under_mpi() -> bool:
    """Whether this process is one of several ranks; found without importing mpi4py."""
    found = launch()
    return found is not None and found.ranks != 1


def rank() -> int:
    """This process's rank as the launcher tells it; 0 without one."""
    found = launch()
    return found.rank if found else 0


def set_mpi_defaults() -> None:
    """Settings that make Open MPI faster; those the user made win. Call it before MPI starts."""
    os.environ.setdefault("OMPI_MCA_btl_sm_eager_limit", str(EAGER_BYTES))


def leave_interpreter() -> None:
    """Let Triton compile in this process, which has not imported it yet."""
    assert "triton" not in sys.modules
    os.environ.pop("TRITON_INTERPRET", None)


def hub_offline() -> bool:
    """Whether the Hugging Face hub is not to be asked; the same test as huggingface_hub's."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def thread_limit() -> int | None:
    """CPU threads the user asked for with OMP_NUM_THREADS, or None."""
    text = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not text:
        return None
    # OpenMP allows one number per nesting level; the outermost is first.
    outermost = text.split(",")[0].strip()
    if not outermost.isdecimal() or int(outermost) == 0:
        raise UserError(f"OMP_NUM_THREADS '{text}' is not a number of threads; set 1 or more")
    return int(outermost)


def rounds_int4_prompts() -> bool:
    """Whether INT4_PROMPTS asks for rounded prompts; UserError for a value that says nothing."""
    value = os.environ.get(INT4_PROMPTS, "").strip() or "exact"
    if value not in ("exact", "int8"):
        raise UserError(
            f"{INT4_PROMPTS} '{value}' is unknown; set it to exact or int8, or unset it"
        )
    return value == "int8"


def own_settings() -> dict[str, str]:
    """This project's own variables that are set, for the record of a measurement."""
    return {name: os.environ[name] for name in (INT4_PROMPTS,) if os.environ.get(name)}


def cxx_compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of the usual names that is installed."""
    names = [os.environ.get("CXX", "").strip(), "g++", "clang++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled kernels are kept between runs: $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(base) if base else Path.home() / ".cache") / "yi-engines"


def _read_count(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None
