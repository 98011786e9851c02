"""Collectives against arithmetic in numpy, on ranks that mpirun starts.

Functions named check_* run on every rank. Their data are small whole numbers, whose sums are
exact in fp32 in any order, so that results are compared bit for bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import comm, nccl
from engine import threads as thread_share
from engine.comm import Group, MpiWorld, Solo, World, open_world
from engine.errors import UserError
from tests.mpi import ROOT, calling, run_ranks

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
SHAPES = ((1, 8), (3, 5), (0, 4), (2, 40_000))

# (tp, pp) → the ranks of every tensor-parallel group, the ranks of every pipeline.
LAYOUTS = {
    (2, 2): ([[0, 1], [2, 3]], [[0, 2], [1, 3]]),
    (1, 3): ([[0], [1], [2]], [[0, 1, 2]]),
    (3, 1): ([[0, 1, 2]], [[0], [1], [2]]),
}


def values_of(rank: int, shape: tuple[int, ...]) -> np.ndarray:
    """Whole numbers of magnitude ≤ 256: exact in every type, their sums not in 16 bits."""
    return np.random.default_rng(rank).integers(-256, 257, shape)


def as_tensor(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values.tolist(), dtype=dtype).view(values.shape)


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """`values` as the nearest numbers of `dtype`, ties to even, as float64."""
    if dtype == torch.bfloat16:
        bits = values.astype(np.float32).view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
    if dtype == torch.float16:
        return values.astype(np.float16).astype(np.float64)
    return values.astype(np.float64)


def assert_equal(x: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(x.double().cpu().numpy(), expected)


def split_world(transport: str, tp: int, pp: int, device: torch.device = CPU) -> comm.Parallel:
    """The groups of this rank; "gloo" takes the code of NCCL over CPU tensors."""
    world = open_world()
    assert isinstance(world, MpiWorld)
    if transport == "gloo":
        opener = world.open_nccl(CPU, "gloo")
        world._group_opener = lambda device: opener
    return world.split(tp, pp, device)


@torch.inference_mode()
def check_ranks(transport: str, ranks: int) -> None:
    check_world(ranks)
    group = split_world(transport, ranks, 1).tp
    assert (group.rank, group.size) == (open_world().rank, ranks)
    check_group(group, CPU)
    if transport == "mpi":
        check_same_everywhere(group)


def check_group(group: Group, device: torch.device) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            everyone = [values_of(rank, shape) for rank in range(group.size)]
            mine = as_tensor(everyone[group.rank], dtype).to(device)
            total = rounded(np.sum(everyone, axis=0), dtype)
            assert_equal(group.all_reduce(mine.clone()), total)
            assert_equal(group.all_gather(mine), np.concatenate(everyone, axis=-1))
            for root in range(group.size):
                assert_equal(group.broadcast(mine.clone(), root), everyone[root])
        # A slice and a transpose are not contiguous.
        everyone = [values_of(rank, (6, 4)) for rank in range(group.size)]
        mine = as_tensor(everyone[group.rank], dtype).to(device)
        total = rounded(np.sum(everyone, axis=0), dtype)
        assert_equal(group.all_reduce(mine.t().clone().t()), total)
        assert_equal(group.all_gather(mine[::2]), np.concatenate(everyone, axis=-1)[::2])


def check_same_everywhere(group: Group) -> None:
    """Sums that do need rounding are close to the true ones, alike on all ranks, and repeat."""
    world = open_world()
    for size in (1, 257, 7168, 100_000):
        draws = [np.random.default_rng(r).standard_normal(size) for r in range(group.size)]
        mine = draws[group.rank].astype(np.float32)
        sums = [group.all_reduce(torch.tensor(mine)) for _ in range(4)]
        np.testing.assert_allclose(sums[0].numpy(), np.sum(draws, axis=0), atol=1e-5)
        assert len({total.numpy().tobytes() for total in sums}) == 1
        assert len(set(world.all_gather(sums[0].numpy().tobytes()))) == 1


def check_world(ranks: int) -> None:
    world = open_world()
    assert world is open_world()
    assert world.size == world.local_size == ranks
    assert sorted(world.all_gather(world.local_rank)) == list(range(ranks))
    assert world.all_gather(world.rank) == list(range(ranks))
    assert world.bcast({"from": world.rank}, root=1) == {"from": 1}
    expected = [str(rank) for rank in range(ranks)] if world.rank == 1 else None
    assert world.gather(str(world.rank), root=1) == expected
    world.barrier()
    check_rest(world)
    threads = thread_share.share_threads(world)
    assert threads == torch.get_num_threads() >= 1
    assert sum(world.all_gather(threads)) <= max(os.cpu_count() or 1, ranks)


def check_rest(world: World) -> None:
    """No rank goes on before the one that works, and those that rest use little processor."""
    used = time.process_time()
    if world.rank == 1:
        time.sleep(0.6)
    arrived = time.monotonic()
    world.rest()
    left, used = time.monotonic(), time.process_time() - used
    assert left >= max(world.all_gather(arrived))
    assert used < 0.3


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("transport", "ranks"), [("mpi", 2), ("mpi", 3), ("mpi", 4), ("gloo", 2), ("gloo", 3)]
)
def test_collectives(transport: str, ranks: int) -> None:
    done = run_ranks(ranks, calling(check_ranks, transport, ranks), env={"OMP_NUM_THREADS": None})
    assert done.returncode == 0, done.stderr


class OneShot:
    """Stands in for memory that GPUs share: gloo brings each rank what the others put there."""

    def __init__(self, fails: bool = False):
        self.fails = fails
        self.added: list[torch.Tensor] = []

    def share(self, process_group: Any, device: torch.device):
        if self.fails:
            raise RuntimeError("no such memory\nand details")
        return torch.empty(nccl.ONE_SHOT_BYTES, dtype=torch.uint8), partial(
            self.add_up, process_group
        )

    def add_up(self, process_group: Any, mine: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, mine, group=process_group)
        self.added.append(mine)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


@torch.inference_mode()
def check_one_shot(ranks: int) -> None:
    world = open_world()
    assert isinstance(world, MpiWorld)
    plain = world.open_nccl(CPU, "gloo")([range(ranks)])
    assert isinstance(plain, nccl.NcclGroup)
    memory = OneShot()
    nccl._share_memory, nccl._find_problem = memory.share, lambda places: None
    group = world._sharing(plain, CPU)
    assert isinstance(group, nccl.OneShotGroup)
    check_group(group, CPU)
    # 16 bits are added in fp32, unless bf16 is rounded but once. Integers are NCCL's, and so are
    # sums that are too large, empty, or no whole loads.
    expected = {(torch.float32, (1, 8)), (torch.float32, (6, 4))}
    if ranks == 2:
        expected |= {(torch.bfloat16, shape) for shape in ((1, 8), (6, 4), (2, 40_000))}
    assert {(total.dtype, tuple(total.shape)) for total in memory.added} == expected
    most = nccl.ONE_SHOT_BYTES // 4
    for size, is_shared in ((most, True), (most + 4, False)):
        memory.added.clear()
        assert group.all_reduce(torch.ones(1, size)).eq(ranks).all()
        assert bool(memory.added) is is_shared
    check_falling_back(world, plain)


def check_falling_back(world: MpiWorld, plain: nccl.NcclGroup) -> None:
    """One GPU that cannot share keeps all ranks from it, and one of them says why, once."""
    warnings: list[str] = []
    nccl.logger.warning = lambda text, *values: warnings.append(text % values)
    nccl._find_problem = lambda places: "a wall between them" if world.rank == 1 else None
    assert world._sharing(plain, CPU) is plain
    nccl._find_problem = lambda places: None
    nccl._share_memory = OneShot(fails=world.rank == 1).share
    assert world._sharing(plain, CPU) is plain
    reasons = [text.partition("(")[2].partition(")")[0] for text in warnings]
    assert reasons == ([] if world.rank else ["a wall between them", "no such memory"])


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_small_sums_in_shared_memory(ranks: int) -> None:
    done = run_ranks(ranks, calling(check_one_shot, ranks))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        ([("a", 0), ("a", 1)], None),
        ([("a", 0), ("b", 1)], "ranks are on several hosts"),
        ([("a", 0), ("a", 1), ("a", 2)], "GPU 0 has no peer access to GPU 2"),
    ],
)
def test_who_can_share_memory(
    places: list[tuple[str, int]], problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, there: there != 2)
    assert nccl._find_problem(places) == problem


def check_layout(transport: str, tp: int, pp: int) -> None:
    world = open_world()
    groups = split_world(transport, tp, pp)
    tp_groups, pipelines = LAYOUTS[tp, pp]
    rank = torch.tensor([world.rank])
    for group, members in (
        (groups.tp, next(ranks for ranks in tp_groups if world.rank in ranks)),
        (groups.stages, next(ranks for ranks in pipelines if world.rank in ranks)),
        (groups.world, list(range(world.size))),
    ):
        assert group.size == len(members)
        assert members[group.rank] == world.rank
        assert group.all_gather(rank).tolist() == members
    for dtype in DTYPES:
        check_pipeline(groups, dtype)


def check_pipeline(groups: comm.Parallel, dtype: torch.dtype) -> None:
    """Every stage adds its number to what the stage before sent."""
    stage, stages = groups.stages.rank, groups.stages.size
    start = as_tensor(values_of(groups.tp.rank, (3, 5000)) // 2, dtype)
    x = start if stage == 0 else groups.recv_prev((3, 5000), dtype)
    x = x + stage
    if stage + 1 < stages:
        groups.send_next(x)
    assert_equal(x, values_of(groups.tp.rank, (3, 5000)) // 2 + sum(range(stage + 1)))


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("transport", "layout"),
    [("mpi", (2, 2)), ("mpi", (1, 3)), ("mpi", (3, 1)), ("gloo", (2, 2))],
)
def test_layout(transport: str, layout: tuple[int, int]) -> None:
    done = run_ranks(layout[0] * layout[1], calling(check_layout, transport, *layout))
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_collectives_of_ranks_on_gpus(ranks: int) -> None:
    """NCCL where every rank has a GPU, host memory where they share one."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    done = run_ranks(ranks, calling(check_gpu_collectives, ranks))
    assert done.returncode == 0, done.stderr


@torch.inference_mode()
def check_gpu_collectives(ranks: int) -> None:
    world, gpus = open_world(), torch.cuda.device_count()
    device = torch.device("cuda", world.local_rank % gpus)
    torch.cuda.set_device(device)
    groups = world.split(1, ranks, device)
    if isinstance(groups.world, nccl.NcclGroup):
        check_group(world._sharing(groups.world, device), device)
    assert isinstance(groups.world, nccl.NcclGroup if gpus >= ranks else comm.StagedGroup)
    check_group(groups.world, device)
    x = torch.full((2, 9), float(world.rank), device=device)
    if world.rank:
        x += groups.recv_prev((2, 9), torch.float32)
    if world.rank + 1 < ranks:
        groups.send_next(x)
    assert_equal(x, np.full((2, 9), sum(range(world.rank + 1))))


def test_solo_gives_back_what_it_gets() -> None:
    world = World()
    groups = world.split(1, 1, CPU)
    x_TN = torch.arange(6.0).view(2, 3)
    for group in (groups.tp, groups.world, groups.stages):
        assert isinstance(group, Solo)
        assert group.all_reduce(x_TN) is x_TN
        assert group.all_gather(x_TN) is x_TN
        assert group.broadcast(x_TN, 0) is x_TN
    world.rest()
    assert world.bcast("a") == "a"
    assert world.gather("a") == world.all_gather("a") == ["a"]
    with pytest.raises(SystemExit) as exit_:
        world.abort(3)
    assert exit_.value.code == 3


def plain_environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMPI_")}
    return {**kept, **variables}


def test_one_process_needs_neither_mpi_nor_torch() -> None:
    code = """
import sys
from engine.comm import open_world
assert open_world().size == 1
sys.exit(" ".join({"torch", "mpi4py"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=plain_environment(), capture_output=True
    )
    assert (done.returncode, done.stderr.strip()) == (1, b"")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[], World]:
    """open_world as rank 0 of 4 sees it, not remembered."""
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_MCA_btl_sm_eager_limit", "4096")
    return open_world.__wrapped__


def test_missing_mpi4py(launched: Callable[[], World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(
        UserError, match="4 ranks were started and mpi4py cannot be used .*pip install"
    ):
        launched()


class LonelyMPI:
    """mpi4py.MPI as it looks when mpirun belongs to another MPI: everyone is rank 0 of 1."""

    class COMM_WORLD:
        Get_size = staticmethod(lambda: 1)


def test_another_mpi_than_mpiruns(
    launched: Callable[[], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = type(sys)("mpi4py")
    package.MPI = LonelyMPI
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    with pytest.raises(UserError, match="4 ranks were started and mpi4py sees 1.*mpirun beside"):
        launched()


class GpuLessRank(MpiWorld):
    """Rank 0 of two, the other of which runs on a GPU."""

    def __init__(self) -> None:
        self.size = 2

    def all_gather(self, obj: Any) -> list[Any]:
        return [obj, "GPU-1"]


def test_a_rank_without_gpu_among_others() -> None:
    with pytest.raises(UserError, match="rank 0 has no GPU and others have one; use --device cpu"):
        GpuLessRank().split(2, 1, CPU)


class RankOfMany(World):
    """Rank 0, with the CPUs that every rank says it may use."""

    def __init__(self, others: list[tuple[str | None, set[int]]]):
        self.size = len(others) + 1
        self.local_size = 1 + sum(host is None for host, _ in others)
        self._others = others

    def all_gather(self, obj: Any) -> list[Any]:
        host, _ = obj
        return [obj, *((theirs or host, frozenset(cpus)) for theirs, cpus in self._others)]


@pytest.fixture
def own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


ALL = set(range(16))


@pytest.mark.parametrize(
    ("cpus", "others", "threads"),
    [
        (ALL, [], 16),
        (ALL, [(None, ALL)] * 3, 4),
        (ALL, [(None, ALL)] * 2, 5),
        (ALL, [("elsewhere", ALL)] * 3, 16),
        ({0}, [(None, {cpu}) for cpu in (1, 2, 3)], 1),
        ({0, 1, 2, 3}, [(None, {4, 5, 6, 7})], 4),
        (set(range(8)), [(None, set(range(8))), (None, set(range(8, 16)))], 4),
        ({0, 1}, [(None, {0, 1})] * 3, 1),
    ],
    ids=["alone", "unbound", "uneven", "other hosts", "cores", "parts", "sockets", "too many"],
)
@pytest.mark.usefixtures("own_threads")
def test_ranks_share_cores(
    monkeypatch: pytest.MonkeyPatch,
    cpus: set[int],
    others: list[tuple[str | None, set[int]]],
    threads: int,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(thread_share, "_cpus_of", lambda pid: frozenset(ALL if pid else cpus))
    monkeypatch.setattr(thread_share, "_count_cores", len)
    assert thread_share.share_threads(RankOfMany(others)) == threads == torch.get_num_threads()


@pytest.mark.parametrize(("cpus", "warnings"), [({0}, 1), (set(range(8)), 0)])
@pytest.mark.usefixtures("own_threads")
def test_bound_ranks_that_leave_cores_idle_are_told(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cpus: set[int],
    warnings: int,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(thread_share, "_cpus_of", lambda pid: frozenset(ALL if pid else cpus))
    monkeypatch.setattr(thread_share, "_count_cores", len)
    monkeypatch.setattr(thread_share.logger.parent, "propagate", True)
    thread_share.share_threads(RankOfMany([(None, {15})]))
    # A set, since log handlers that other tests leave may record a message twice.
    told = {record.getMessage() for record in caplog.records}
    assert sum("bound to 1 of 16 cores; 'mpirun --bind-to none'" in one for one in told) == warnings


@pytest.mark.usefixtures("own_threads")
def test_omp_num_threads_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert thread_share.share_threads(RankOfMany([(None, ALL)] * 7)) == 3 == torch.get_num_threads()


def test_hardware_threads_of_a_core_count_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for cpu in range(4):
        (tmp_path / str(cpu)).write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    monkeypatch.setattr(thread_share, "SIBLINGS", str(tmp_path / "{}"))
    assert thread_share._count_cores(frozenset({0, 1, 2, 3})) == 2
    assert thread_share._count_cores(frozenset({0, 2})) == 1
    # CPUs 8 and 9 are unknown to the system.
    assert thread_share._count_cores(frozenset({1, 8, 9})) == 3


@pytest.mark.parametrize(
    ("gpus", "shared"),
    [
        (["a", "a"], "2 ranks would share 1 GPU,"),
        (["a", "b", "a", "b"], "4 ranks would share 2 GPUs,"),
        (["a", "b"], None),
        ([None, None], None),
    ],
)
def test_ranks_that_share_a_gpu_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: list[str | None], shared: str | None
) -> None:
    world = object.__new__(MpiWorld)
    world.size = len(gpus)
    monkeypatch.setattr(world, "all_gather", lambda own: gpus)
    monkeypatch.setattr(comm, "_gpu_of", lambda device: gpus[0])
    World().refuse_shared_gpus(CPU)
    if shared is None:
        world.refuse_shared_gpus(CPU)
        return
    with pytest.raises(UserError) as error:
        world.refuse_shared_gpus(CPU)
    assert str(error.value) == (
        f"{shared} which is slow; use an engine of fewer ranks, --device cpu, or "
        "--oversubscribe_gpu to share them"
    )
