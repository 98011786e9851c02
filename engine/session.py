"""Session: a loaded engine that answers prompts. It owns the loop and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from math import prod

from torch import Tensor

from engine.batch import Packer
from engine.cache import CODE_DTYPES, BlockTables, KVCache
from engine.comm import Parallel, World
from engine.decoding import Beam, make_decoder
from engine.errors import RequestError
from engine.graph import GraphPool
from engine.graphed_batch import GraphedBatch
from engine.kernels.registry import runs_by
from engine.models.yi import Yi
from engine.penalties import check_tokens, round_up
from engine.record import EngineRecord
from engine.sampling import SamplingParams
from engine.static_batch import StaticBatch

# A cache that serves the batches before, too, may take this many times what the next one needs.
MAX_GROWTH = 2


@dataclass(frozen=True)
class Result:
    """What a prompt got: `beams` best first.

    `context_logits` fp32 [prompt, V] and `generation_logits` fp32 [new tokens, V] are on the CPU
    and None unless asked for; the latter belong to greedy or sampled requests only.
    """

    prompt_index: int
    beams: tuple[Beam, ...]
    context_logits: Tensor | None = None
    generation_logits: Tensor | None = None


class Session:
    """Runs batches of at most `max_batch_size` prompts, one after the other.

    Every rank calls the same methods with the same arguments and gets the same results; the first
    rank of the last pipeline stage decides the tokens and tells the others.
    """

    def __init__(
        self,
        record: EngineRecord,
        network: Yi,
        world: World,
        parallel: Parallel,
        max_attention_window: int | None = None,
    ):
        self.info = record
        self._network, self._world, self._parallel = network, world, parallel
        self._window = max_attention_window
        self._cache: KVCache | None = None
        self._cache_shape = (0, 0)
        self._decides_on = (record.mapping.pp - 1) * record.mapping.tp
        self._graphs = GraphPool(network) if self._can_capture() else None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        context_logits: bool = False,
        generation_logits: bool = False,
    ) -> list[Result]:
        """Continuations of token id prompts, in order; `params` has one entry per prompt.

        Raises RequestError for a prompt or parameters that the engine cannot serve, before
        anything is computed.
        """
        check_requests(self.info, prompts, params, wants_logits=context_logits)
        results: list[Result] = []
        for batch in self._batches(prompts, params, context_logits, generation_logits):
            for _ in batch.run():
                pass
            results += self._results(batch, len(results))
            # The next batch may need a larger cache, and this one's memory before that.
            del batch
        return results

    def stream(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], interval: int
    ) -> Iterator[list[Result]]:
        """As `generate`; yields what there is so far every `interval` tokens and at the end.

        Each list holds the results of every batch begun so far; the last one holds them all.
        """
        check_requests(self.info, prompts, params)
        done: list[Result] = []
        for batch in self._batches(prompts, params, False, False):
            for step, _ in enumerate(batch.run(), start=1):
                if step % interval == 0 and not batch.is_finished:
                    yield done + self._results(batch, len(done))
            done += self._results(batch, len(done))
            del batch
            yield done

    def score(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits fp32 [prompt, V] at every position of each prompt, on the CPU of every rank."""
        params = [SamplingParams(max_new_tokens=1)] * len(prompts)
        check_requests(self.info, prompts, params)
        logits: list[Tensor] = []
        for batch in self._batches(prompts, params, True, False):
            batch.prefill()
            logits += self._world.bcast(batch.context_logits, root=self._decides_on)
            del batch
        return logits

    def _results(self, batch: StaticBatch, first_index: int) -> list[Result]:
        found = None
        if batch.decoder is not None:
            found = [
                Result(first_index + row, beams, context, generation)
                for row, (beams, context, generation) in enumerate(
                    zip(
                        batch.decoder.results(),
                        batch.context_logits or repeat(None),
                        batch.generation_logits() or repeat(None),
                        strict=False,
                    )
                )
            ]
        return self._world.bcast(found, root=self._decides_on)

    def _batches(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        context_logits: bool,
        generation_logits: bool,
    ) -> Iterator[StaticBatch]:
        # Beam widths do not mix in one batch, so a change of width starts another.
        start = 0
        while start < len(prompts):
            stop = start + 1
            beams = params[start].num_beams
            limit = min(len(prompts), start + self.info.limits.max_batch_size)
            while stop < limit and params[stop].num_beams == beams:
                stop += 1
            yield self._open_batch(
                prompts[start:stop],
                params[start:stop],
                context_logits=context_logits,
                generation_logits=generation_logits,
            )
            start = stop

    def _open_batch(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        context_logits: bool,
        generation_logits: bool,
    ) -> StaticBatch:
        needed = [len(prompt) + p.max_new_tokens for prompt, p in zip(prompts, params, strict=True)]
        cache, packer = self.open_cache(len(prompts) * params[0].num_beams, max(needed))
        vocab_size = self.info.config.vocab_size
        options = {
            "network": self._network,
            "cache": cache,
            "packer": packer,
            "group": self._parallel.world,
            "decides_on": self._decides_on,
            "max_tokens": self.info.limits.max_num_tokens,
            "context_logits": context_logits,
        }
        if self._graphs is not None and params[0].num_beams == 1 and not generation_logits:
            prepare = partial(self._graphs.prepare, cache=cache)
            return GraphedBatch(prompts, params, vocab_size=vocab_size, prepare=prepare, **options)
        decoder = None
        if self.info.mapping.rank == self._decides_on:
            decoder = make_decoder(params, prompts, vocab_size, self._network.device)
        return StaticBatch(
            prompts,
            params[0].num_beams,
            decoder=decoder,
            generation_logits=generation_logits,
            **options,
        )

    def open_cache(self, rows: int, length: int) -> tuple[KVCache, Packer]:
        """A cache for `rows` sequences of `length` positions, and what packs steps for it."""
        cache, tables = self._cache_for(rows, length)
        scale, device = self.info.config.head_dim**-0.5, self._network.device
        return cache, Packer(tables, scale=scale, window=self._window, device=device)

    def _can_capture(self) -> bool:
        """Whether decode steps can be CUDA graphs: kernels and collectives that wait for nothing,
        and the logits on every rank."""
        device = self._network.device
        return (
            device.type == "cuda"
            and self.info.mapping.pp == 1
            and self._parallel.tp.is_capturable
            and runs_by("triton", "attention", device)
            and runs_by("triton", "write_kv", device)
        )

    def _cache_for(self, rows: int, length: int) -> tuple[KVCache, BlockTables]:
        """A cache with room for `rows` sequences of `length` positions, and its block tables.

        The memory is kept between batches and grows when one needs more.
        """
        limits, mapping, config = self.info.limits, self.info.mapping, self.info.config
        # Neighbouring lengths share one cache, and with it the graphs captured for it.
        length = min(round_up(length), limits.max_seq_len)
        block_tokens = limits.tokens_per_block if limits.paged_kv_cache else length
        num_blocks = rows * -(-length // block_tokens)
        if self._cache is None or not self._shape_serves(num_blocks, block_tokens):
            num_blocks, block_tokens = self._grow(num_blocks, block_tokens)
            self._cache = None
            if self._graphs is not None:
                self._graphs.clear()
            self._cache = KVCache(
                layers=mapping.layer_span(config).size,
                kv_heads=mapping.local(config).kv_heads,
                head_dim=config.head_dim,
                num_blocks=num_blocks,
                block_tokens=block_tokens,
                dtype=CODE_DTYPES.get(self.info.quant.kv, self._network.dtype),
                device=self._network.device,
                scales=self._network.kv_scales,
            )
            self._cache_shape = (num_blocks, block_tokens)
        held_blocks, held_tokens = self._cache_shape
        return self._cache, BlockTables(held_blocks, held_tokens, -(-length // held_tokens))

    def _grow(self, num_blocks: int, block_tokens: int) -> tuple[int, int]:
        """The shape of a cache in place of the one held: it serves both, if that is not much more
        memory than this one alone takes."""
        held_blocks, held_tokens = self._cache_shape
        both = max(num_blocks, held_blocks), max(block_tokens, held_tokens)
        serves_both = prod(both) <= MAX_GROWTH * num_blocks * block_tokens
        return both if serves_both else (num_blocks, block_tokens)

    def _shape_serves(self, num_blocks: int, block_tokens: int) -> bool:
        held_blocks, held_tokens = self._cache_shape
        return held_blocks >= num_blocks and held_tokens >= block_tokens


def check_requests(
    record: EngineRecord,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    wants_logits: bool = False,
) -> None:
    """Raise RequestError for what an engine cannot serve; `wants_logits`: of prompt tokens."""
    assert len(prompts) == len(params)
    limits = record.limits
    if wants_logits and not limits.gather_all_token_logits:
        raise RequestError(
            "logits of prompt tokens were asked for and the engine was built without "
            "--gather_all_token_logits; build it with that flag"
        )
    # Decoders look, too, but one rank alone has a decoder.
    check_tokens(params, prompts, record.config.vocab_size)
    for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        if len(prompt) > limits.max_input_len:
            raise RequestError(
                f"prompt {index} has {len(prompt)} tokens and the engine was built for "
                f"--max_input_len {limits.max_input_len}; shorten it, cut it with "
                "--max_input_length, or build with a larger limit"
            )
        if one.max_new_tokens > limits.max_output_len:
            raise RequestError(
                f"--max_output_len {one.max_new_tokens} exceeds the engine's "
                f"--max_output_len {limits.max_output_len}; ask for less or build with more"
            )
        if one.num_beams > limits.max_beam_width:
            raise RequestError(
                f"--num_beams {one.num_beams} exceeds the engine's --max_beam_width "
                f"{limits.max_beam_width}; ask for fewer beams or build with more"
            )
