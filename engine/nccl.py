"""Groups of ranks that have a GPU each: NCCL, and small sums in memory that the GPUs share.

Opened by comm.py, whose promises hold here. torch.distributed is imported when a group is opened.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engine.comm import World, is_narrow, join_columns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger("yi.comm")

# Sums of up to so many bytes are taken in shared memory: every rank reads all of everyone's, where
# NCCL's ring takes longer to start and moves less. Two H100 take 9.6 µs for 8 KB and 11.7 for 256,
# NCCL 12.2 and 14.3; larger sums and more ranks were not measured.
ONE_SHOT_BYTES = 256 << 10
# Widest load of a GPU: the kernel wants whole ones.
LOAD_BYTES = 16


class NcclGroup:
    """CUDA tensors through torch.distributed, in the order of the current stream."""

    is_capturable = True

    def __init__(self, process_group: Any):
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self._dist, self._group = dist, process_group

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        # Two summands are rounded once in any type, so only more of them need fp32.
        total = x.float() if is_narrow(x) and self.size > 2 else x
        self._dist.all_reduce(total, group=self._group)
        return x if total is x else x.copy_(total)

    def all_gather(self, x_TN: Tensor) -> Tensor:
        parts = x_TN.new_empty(self.size, *x_TN.shape)
        # Gloo wants the ranks' rows one below the other, NCCL takes any shape.
        self._dist.all_gather_into_tensor(parts.flatten(0, 1), x_TN.contiguous(), group=self._group)
        return join_columns(parts)

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        self._dist.broadcast(x, group=self._group, group_src=root)
        return x

    def send(self, x: Tensor, to: int) -> None:
        self._dist.send(x.contiguous(), group=self._group, group_dst=to)

    def receive(self, x: Tensor, source: int) -> Tensor:
        self._dist.recv(x, group=self._group, group_src=source)
        return x


class OneShotGroup(NcclGroup):
    """As NcclGroup, but small sums are one kernel: each rank adds up, in rank order, what all have
    put into memory that they share.

    The kernel ends on no rank before all have read, so one buffer serves every sum of the stream.
    """

    def __init__(self, process_group: Any, device: torch.device):
        super().__init__(process_group)
        self._shared, self._add_up = _share_memory(process_group, device)

    def all_reduce(self, x: Tensor) -> Tensor:
        dtype = self._summed_in(x)
        size = x.numel() * dtype.itemsize if dtype else 0
        if not 0 < size <= ONE_SHOT_BYTES or size % LOAD_BYTES:
            return super().all_reduce(x)
        mine = self._shared[:size].view(dtype).view(x.shape).copy_(x)
        return self._add_up(mine).to(x.dtype)

    def _summed_in(self, x: Tensor) -> torch.dtype | None:
        """The kernel adds bf16 in bf16 and knows no fp16; None for what it cannot add."""
        import torch

        if x.dtype == torch.bfloat16 and self.size == 2:
            return torch.bfloat16
        return torch.float32 if x.dtype == torch.float32 or is_narrow(x) else None


def open_one_shot(group: NcclGroup, world: World, device: torch.device) -> NcclGroup:
    """`group` with small sums in shared memory, or itself where a GPU of any group cannot read
    another's. Every rank of `world` calls it."""
    import torch.distributed as dist

    places = world.all_gather((socket.gethostname(), device.index))
    problem = _find_problem([places[rank] for rank in dist.get_process_group_ranks(group._group)])
    shared = None
    if not any(world.all_gather(problem)):
        try:
            shared = OneShotGroup(group._group, device)
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
    problems = [found for found in world.all_gather(problem) if found]
    if problems and world.rank == 0:
        logger.warning(
            "--use_custom_all_reduce has no effect, GPUs cannot share memory (%s): sums go "
            "through NCCL",
            problems[0],
        )
    return group if problems or shared is None else shared


def _find_problem(places: Sequence[tuple[str, int]]) -> str | None:
    """What keeps this rank's GPU from reading those of its group: (host, device) each."""
    import torch

    if len({host for host, _ in places}) > 1:
        return "ranks are on several hosts"
    here = torch.cuda.current_device()
    for device in {index for _, index in places} - {here}:
        if not torch.cuda.can_device_access_peer(here, device):
            return f"GPU {here} has no peer access to GPU {device}"
    return None


def _share_memory(
    process_group: Any, device: torch.device
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """ONE_SHOT_BYTES that the group's GPUs map, and the sum over ranks of a part of them.

    Not `one_shot_all_reduce_copy`, which would save a kernel: it tells the other ranks that its
    copy is there before all threads have made their part of it (torch 2.13).
    """
    import torch
    import torch.distributed._symmetric_memory as symmetric

    buffer = symmetric.empty(ONE_SHOT_BYTES, dtype=torch.uint8, device=device)
    symmetric.rendezvous(buffer, process_group)
    name = process_group.group_name
    return buffer, lambda mine: torch.ops.symm_mem.one_shot_all_reduce(mine, "sum", name)
