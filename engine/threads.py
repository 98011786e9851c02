"""How many CPU threads a rank takes, so that the ranks of a host do not fight for cores."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from engine import env

if TYPE_CHECKING:
    from engine.comm import World

logger = logging.getLogger("yi.threads")

# Linux lists the hardware threads of a core under each of them.
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def share_threads(world: World) -> int:
    """Set the number of torch's CPU threads on this rank; returns it. Every rank calls it.

    It is OMP_NUM_THREADS if the user set that. Otherwise it is the number of physical cores that
    this process may use, divided among the ranks that may use the same ones: ranks bound to cores
    of their own keep them, unbound ones get equal shares.
    """
    import torch

    cpus = _cpus_of(0)
    place = (socket.gethostname(), cpus)
    places = world.all_gather(place)
    sharing = sum(host == place[0] and not cpus.isdisjoint(theirs) for host, theirs in places)
    threads = env.thread_limit()
    if threads is None:
        threads = max(_count_cores(cpus) // sharing, 1)
        # The launcher itself is not bound, so what it may use is what the ranks could share.
        cores = _count_cores(_cpus_of(os.getppid())) if world.size > 1 else 0
        if world.rank == 0 and threads * world.local_size * 2 <= cores:
            logger.warning(
                "each rank is bound to %d of %d cores; 'mpirun --bind-to none' lets the ranks "
                "share them all",
                threads,
                cores,
            )
    torch.set_num_threads(threads)
    return threads


def _cpus_of(pid: int) -> frozenset[int]:
    """CPUs that process `pid` may run on (0: this one)."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(pid))
    return frozenset(range(os.cpu_count() or 1))


def _count_cores(cpus: frozenset[int]) -> int:
    """Physical cores among `cpus`; where the system does not tell, each is one."""
    cores = set()
    for cpu in cpus:
        path = Path(SIBLINGS.format(cpu))
        cores.add(path.read_text() if path.is_file() else str(cpu))
    return len(cores)
