"""Decoding that the host only starts: tokens, positions, cache slots and sampling stay on the
device, and on a GPU a whole step is one CUDA graph. Results are read late.

Knows nothing of prompts being computed (static_batch) or of beams, whose choices are the host's.
"""

# Dimensions:
#   B rows, padded to a bucket   M blocks per sequence   V vocabulary   N steps

from __future__ import annotations

import atexit
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.batch import Packer
from engine.cache import KVCache
from engine.decoding import Beam, read_beams
from engine.kernels import api as ops
from engine.kernels.api import Attending
from engine.models.yi import Step, Yi
from engine.penalties import DeviceState, round_up
from engine.sampling import FinishReason, Sampler, SamplingParams
from engine.transfer import to_device

# Rows are padded to these, then to multiples of the last: one graph serves all batches of a bucket.
BUCKETS = (1, 2, 4, 8, 16, 32)
# Steps that may be under way before the host looks whether all rows have finished.
RUN_AHEAD = 4
WARM_UP_STEPS = 2


class Rows(NamedTuple):
    """What a batch is after its prompts: requests, cached lengths and cache blocks."""

    params: Sequence[SamplingParams]
    prompts: Sequence[Sequence[int]]
    table_BM: Tensor  # int32, on the CPU, with the blocks of all tokens to come


class DecodeLoop(DeviceState):
    """Rows that decode together. `choose` takes tokens from logits, `advance` computes the next.

    All state is in buffers of fixed shape, so a captured `advance` serves every loop of its plan.
    Rows that have finished are computed on, at the same place, and change nothing.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        vocab_size: int,
        packer: Packer,
    ):
        super().__init__()
        device = packer.device
        real, bucket = len(rows.params), pad_rows(len(rows.params))
        self.params, self.num_real = list(rows.params), real
        # Rows of padding have a prompt of one token and have finished before they begin.
        padding = [SamplingParams(max_new_tokens=1, end_ids=())] * (bucket - real)
        prompts = [*rows.prompts, *[[0]] * (bucket - real)]
        self.sampler = Sampler([*rows.params, *padding], prompts, vocab_size, device)
        self.sampler.reasons_B[real:] = FinishReason.LENGTH.value
        ends = [len(t) + p.max_new_tokens for t, p in zip(rows.prompts, rows.params, strict=True)]
        self.bound, self.block_tokens = round_up(max(ends)), packer.tables.block_tokens
        self.window, self.scale = packer.window, packer.scale
        table_BM = torch.zeros(bucket, rows.table_BM.shape[1], dtype=torch.int32)
        table_BM[:real] = rows.table_BM
        self.table_BM = nn.Buffer(to_device(table_BM, device))
        self.starts_B1 = nn.Buffer(torch.arange(bucket + 1, dtype=torch.int32, device=device))
        if self.sampler.has_log_probs:
            steps = round_up(1 + max(p.max_new_tokens for p in rows.params))
            self.log_probs_BN = nn.Buffer(torch.zeros(bucket, steps, device=device))

    @property
    def steps(self) -> int:
        """How often `advance` is called at most: the first tokens come from the prompts' logits."""
        return max(p.max_new_tokens for p in self.params) - 1

    @property
    def num_alive(self) -> Tensor:
        """Rows that have not finished, int64 [1]."""
        return self.sampler.num_alive

    def extra_repr(self) -> str:
        return f"bound={self.bound}, block={self.block_tokens}, window={self.window}"

    def choose(self, logits_BV: Tensor) -> None:
        """Tokens from logits [B, V] (or of the real rows only)."""
        bucket = len(self.starts_B1) - 1
        if len(logits_BV) < bucket:
            logits_BV = nn.functional.pad(logits_BV, (0, 0, 0, bucket - len(logits_BV)))
        if not self.sampler.has_log_probs:
            self.sampler.step(logits_BV)
            return
        columns_B1 = self.sampler.history.num_new()[:, None]
        sampled = self.sampler.step(logits_BV)
        self.log_probs_BN.scatter_(1, columns_B1, sampled.log_probs_B[:, None])

    def advance(self, network: Yi, cache: KVCache) -> None:
        """Compute the chosen tokens and choose the next ones."""
        logits_BV = network(self._step(), cache)
        assert logits_BV is not None, "the last pipeline stage decodes"
        self.choose(logits_BV)

    def _step(self) -> Step:
        history, bucket = self.sampler.history, len(self.starts_B1) - 1
        places = ops.place_tokens(
            history.ends_B, history.lookback, self.table_BM, self.block_tokens
        )
        attending = Attending(
            query_lens=(1,) * bucket,
            kv_lens=(self.bound,) * bucket,
            kv_lens_B=places.kv_lens_B,
            query_starts_B1=self.starts_B1,
            block_table_BM=self.table_BM,
            slots_T=places.slots_B,
            window=self.window,
            scale=self.scale,
            is_bound=True,
        )
        tokens_B, positions_B = self.sampler.tokens_B, places.positions_B
        return Step(tokens_B, positions_B, places.kv_lens_B, attending, None)

    def results(self) -> list[tuple[Beam, ...]]:
        log_probs = self.log_probs_BN.tolist() if self.sampler.has_log_probs else None
        return read_beams(self.sampler, self.params, log_probs)


class GraphPool:
    """Captured steps by plan, in one memory pool. Graphs belong to one cache, the last one that
    was prepared for, and go with it."""

    def __init__(self, network: Yi):
        self._network = network
        self._cache: KVCache | None = None
        # NCCL's communicators, stopped at exit as well, wait for all graphs that use them.
        atexit.register(_clear, weakref.ref(self))
        self._captured: dict[tuple, tuple[DecodeLoop, torch.cuda.CUDAGraph]] = {}

    def clear(self) -> None:
        """Let go of the cache and of the graphs that use it."""
        self._captured.clear()
        self._cache = None

    def prepare(self, loop: DecodeLoop, cache: KVCache) -> tuple[DecodeLoop, Callable[[], None]]:
        """The loop whose state a replay changes, with what `loop` holds, and the replay."""
        if cache is not self._cache:
            self.clear()
            self._cache = cache
        plan = loop.plan()
        if plan not in self._captured:
            self._captured[plan] = (loop, self._capture(loop, cache))
        captured, graph = self._captured[plan]
        if captured is not loop:
            captured.adopt(loop)
            captured.params, captured.num_real = loop.params, loop.num_real
        return captured, graph.replay

    def _capture(self, loop: DecodeLoop, cache: KVCache) -> torch.cuda.CUDAGraph:
        before = {name: buffer.clone() for name, buffer in loop.state_dict().items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Kernels compile and libraries make their handles now; what it caches is overwritten.
            for _ in range(WARM_UP_STEPS):
                loop.advance(self._network, cache)
        torch.cuda.current_stream().wait_stream(side)
        if not self._captured:
            # A pool is gone with the last graph in it, and its handle is of no use any more.
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            loop.advance(self._network, cache)
        loop.load_state_dict(before)
        return graph


def _clear(pool: weakref.ref[GraphPool]) -> None:
    if (alive := pool()) is not None:
        alive.clear()


def run_ahead(loop: DecodeLoop, replay: Callable[[], None]) -> Iterator[None]:
    """Replay until all rows have finished; control returns after every step that was started.

    The host learns that rows have finished some steps late; what is computed meanwhile is nothing.
    """
    watches: deque[_Watch] = deque()
    for _ in range(loop.steps):
        if len(watches) == RUN_AHEAD and watches.popleft().has_ended():
            return
        replay()
        watches.append(_Watch(loop.num_alive))
        yield


class _Watch:
    """A count on its way from the device to the host."""

    def __init__(self, count: Tensor):
        self._event = None
        if count.is_cuda:
            self._value = torch.empty(1, dtype=count.dtype, pin_memory=True)
            self._value.copy_(count, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._value = count.clone()

    def has_ended(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return int(self._value) == 0


def pad_rows(rows: int) -> int:
    """The bucket of a number of rows."""
    for bucket in BUCKETS:
        if rows <= bucket:
            return bucket
    return -(-rows // BUCKETS[-1]) * BUCKETS[-1]
