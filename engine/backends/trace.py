"""The steps of an engine's session over tensors without memory, on the meta device.

Shapes, types, strides and alignments of every kernel launch are those of a run, because the code
is. What is traced: decode steps of every graph bucket, and prompts of every number of tokens that
kernels tell apart, without an attention window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.batch import Packer, Segment
from engine.cache import KVCache
from engine.comm import Parallel, World
from engine.engine_file import view_tensors
from engine.graph import DecodeLoop, Rows, pad_rows
from engine.kernels.triton._launch import processors
from engine.kernels.triton._tactics import TOKEN_BUCKETS, record, short_list
from engine.mapping import Mapping
from engine.models.yi import Yi
from engine.penalties import round_up
from engine.record import EngineRecord
from engine.sampling import SamplingParams
from engine.session import Session
from engine.tactics import find_cases, make_runs

META = torch.device("meta")
# Layers of a stage launch the same kernels but for where their cache scales lie, fp32 of a few
# heads side by side: every second layer's have the same alignment.
LAYERS = 2
# Blocks of a sequence: one, a multiple of 16, which Triton compiles for, and another number.
BLOCKS = (1, 2, 16)
# Positions before a prompt: whole long ones go to a library, which has nothing to compile.
PREFIX = 1
GREEDY = SamplingParams(max_new_tokens=2)
SAMPLING = (
    GREEDY,
    replace(GREEDY, top_k=8, top_p=0.9, temperature=0.7, end_ids=(2, 7)),
    replace(GREEDY, top_k=0, repetition_penalty=1.1, stop_words=((3, 4),), log_probs=True),
)


class Absent:
    """A group whose other ranks are not there; results have the shapes they would have."""

    is_capturable = True

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x_TN: Tensor) -> Tensor:
        return x_TN.new_empty(len(x_TN), self.size * x_TN.shape[1])

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        return x

    def send(self, x: Tensor, to: int) -> None:
        pass

    def receive(self, x: Tensor, source: int) -> Tensor:
        return x


class Trace:
    """One rank of an engine, whose files are in `folder`."""

    def __init__(self, engine: EngineRecord, mapping: Mapping, folder: Path):
        layers = min(engine.config.num_layers, LAYERS * mapping.pp)
        config = replace(engine.config, num_layers=layers)
        self._engine = replace(engine, config=config, mapping=mapping)
        file = engine.files[mapping.rank]
        arena = torch.empty(file.bytes, dtype=torch.uint8, device=META)
        tensors = view_tensors(folder / file.name, arena.untyped_storage())
        self._parallel = Parallel(
            tp=Absent(mapping.tp_rank, mapping.tp),
            world=Absent(mapping.rank, mapping.world),
            stages=Absent(mapping.pp_rank, mapping.pp),
            device=META,
        )
        self._network = Yi(
            config, engine.quant, mapping, engine.embedding_dim, tensors, self._parallel
        )

    def run(self) -> None:
        """Prompts and decode steps, by the tactics that are known."""
        for length in _lengths(self._engine):
            for tokens in _prompt_tokens(self._engine):
                self._prompts(tokens, length)
        self.run_decoding()

    def run_decoding(self) -> None:
        limits = self._engine.limits
        for rows in _buckets(limits.max_batch_size):
            for length in _lengths(self._engine):
                for sampling in SAMPLING:
                    self._decode(rows, length, sampling)
            for length in _bounds(limits.max_seq_len):
                self._decode(rows, length, GREEDY)

    def run_candidates(self) -> None:
        """What the first run on a GPU measures, and a decode step by each of it."""
        most = self._engine.limits.max_batch_size
        shortest = min(_lengths(self._engine))
        cases = find_cases(self._network, most)
        lists = [short_list(*case.key, processors(META)) for case in cases]
        for turn in range(max(map(len, lists), default=0)):
            for case, configs in zip(cases, lists, strict=True):
                record(*case.key, configs[turn % len(configs)])
            for tokens in {case.tokens for case in cases}:
                for run in make_runs(self._network, tokens):
                    run()
                self._decode(min(tokens, pad_rows(most)), shortest, GREEDY)

    def _prompts(self, tokens: int, length: int) -> None:
        limits = self._engine.limits
        sizes = _cut(tokens, limits.max_input_len)
        cache, packer = self._open(len(sizes), max(length, sizes[0] + PREFIX))
        for row in range(len(sizes)):
            packer.tables.append(row, PREFIX)
        segments = [Segment(row, [0] * size, size) for row, size in enumerate(sizes)]
        outputs = range(tokens if limits.gather_all_token_logits else len(sizes))
        self._network(packer.pack(segments, outputs), cache)

    def _decode(self, rows: int, length: int, sampling: SamplingParams) -> None:
        cache, packer = self._open(rows, length)
        tables = packer.tables
        if self._engine.mapping.pp > 1:
            for row in range(rows):
                tables.append(row, length - 1)
            segments = [Segment(row, [0], length) for row in range(rows)]
            self._network(packer.pack(segments, range(rows)), cache)
            return
        for row in range(rows):
            tables.append(row, length)
        prompts = [[0] * max(1, length - sampling.max_new_tokens)] * rows
        requests = Rows([sampling] * rows, prompts, tables.table())
        vocab_size = self._engine.config.vocab_size
        loop = DecodeLoop(requests, vocab_size=vocab_size, packer=packer)
        loop.choose(torch.empty(rows, vocab_size, dtype=self._network.dtype, device=META))
        loop.advance(self._network, cache)

    def _open(self, rows: int, length: int) -> tuple[KVCache, Packer]:
        # An old session's cache may be longer than what is asked for.
        session = Session(self._engine, self._network, World(), self._parallel)
        cache, packer = session.open_cache(rows, length)
        packer.tables.open(rows)
        return cache, packer


def _buckets(most: int) -> list[int]:
    """Rows of the graphs for batches of up to `most`."""
    return sorted({pad_rows(rows) for rows in range(1, most + 1)})


def _lengths(engine: EngineRecord) -> list[int]:
    """Lengths of sequences that lead to different launches."""
    limits = engine.limits
    blocks = BLOCKS if limits.paged_kv_cache else ()
    lengths = {GREEDY.max_new_tokens + 1, *(count * limits.tokens_per_block for count in blocks)}
    return sorted({min(length, limits.max_seq_len) for length in lengths} | {limits.max_seq_len})


def _bounds(most: int) -> Iterator[int]:
    """Lengths that graphs are captured for: long ones grow by an eighth, which changes little in
    how attention is split."""
    bound = round_up(1)
    while bound < most:
        yield bound
        bound = round_up(max(bound + 1, bound * 9 // 8))


def _prompt_tokens(engine: EngineRecord) -> list[int]:
    """Numbers of packed tokens: the largest of each bucket, and one fewer, which is odd."""
    limits = engine.limits
    most = limits.max_num_tokens or limits.max_batch_size * limits.max_input_len
    numbers = {number for bucket in TOKEN_BUCKETS for number in (bucket - 1, bucket)}
    return sorted({min(number, most) for number in numbers if number})


def _cut(tokens: int, most: int) -> list[int]:
    """Prompts of up to `most` tokens."""
    whole, rest = divmod(tokens, most)
    return [most] * whole + [rest] * (rest > 0)
