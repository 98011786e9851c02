"""What a quantised KV cache costs a decode step on this CPU: attention alone, against bf16.

    python -m benchmarks.cpu_attention

One layer of Yi-6B (32 heads, 4 kv heads of 128) decodes one token, over caches of bf16, int8 and
fp8. Layers rotate, as in a model, so that no cache is in the processor from the last call. Prints
a Markdown row for each: the 20th percentile of single calls in milliseconds, and its ratio to
bf16 with the same blocks, one of all positions or pages. The caches take turns, so that another
load of the machine falls on all of them. Results are checked against the reference first. Set
OMP_NUM_THREADS for the number of threads; it must not exceed the cores that are idle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.cache import CODE_DTYPES, KVCache
from engine.kernels import cpu, reference
from engine.kernels.api import Attending

HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
CONTEXTS = (1024, 4096)
PAGE_TOKENS = 64
CACHES = (torch.bfloat16, *CODE_DTYPES.values())
# Larger than the last-level cache.
ROTATED_BYTES = 160e6
CALLS = 100
# Of the largest output; int8 and fp8 are compared with the arithmetic on the same codes.
MAX_ERROR = 1e-2


def make_cache(dtype: torch.dtype, context: int, block_tokens: int) -> KVCache:
    """Normal keys and values in as many layers as exceed the processor's caches."""
    layers = int(ROTATED_BYTES / (2 * KV_HEADS * context * HEAD_DIM * dtype.itemsize)) + 1
    codes = dtype in CODE_DTYPES.values()
    # Four standard deviations are the largest value.
    largest = 127 if dtype == torch.int8 else 448
    cache = KVCache(
        layers=layers,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_blocks=context // block_tokens,
        block_tokens=block_tokens,
        dtype=dtype,
        device="cpu",
        scales=torch.full((layers, 2, KV_HEADS), 4 / largest) if codes else None,
    )
    k, v = torch.randn(2, context, KV_HEADS, HEAD_DIM).to(torch.bfloat16)
    for slot in range(layers):
        cpu.write_kv(k, v, cache.layer(slot), torch.arange(context))
    return cache


def make_batch(context: int, block_tokens: int) -> Attending:
    return Attending(
        query_lens=(1,),
        kv_lens=(context,),
        kv_lens_B=torch.tensor([context], dtype=torch.int32),
        query_starts_B1=torch.tensor([0, 1], dtype=torch.int32),
        block_table_BM=torch.arange(context // block_tokens, dtype=torch.int32)[None],
        slots_T=torch.tensor([context - 1]),
        window=None,
        scale=HEAD_DIM**-0.5,
    )


def prepare(dtype: torch.dtype, context: int, block_tokens: int) -> Callable[[int], Tensor]:
    """Attention over layer call % layers of a new cache."""
    torch.manual_seed(0)
    cache, batch = make_cache(dtype, context, block_tokens), make_batch(context, block_tokens)
    q_THD = torch.randn(1, HEADS, HEAD_DIM).to(torch.bfloat16)
    layers = [cache.layer(slot) for slot in range(cache.num_layers)]
    o_THD = cpu.attention(q_THD, layers[0], batch).float()
    truth_THD = reference.attention(q_THD.float(), layers[0], batch)
    assert (o_THD - truth_THD).abs().max() <= MAX_ERROR * truth_THD.abs().max(), "wrong result"
    return lambda call: cpu.attention(q_THD, layers[call % len(layers)], batch)


def time_ms(runs: Sequence[Callable[[int], Tensor]]) -> list[float]:
    """20th percentile of single calls of each: what they take while nothing else disturbs them."""
    seconds: list[list[float]] = [[] for _ in runs]
    for call in range(CALLS):
        for run, taken in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run(call)
            taken.append(time.perf_counter() - start)
    return [sorted(taken)[CALLS // 5] * 1e3 for taken in seconds]


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| context | block | cache | ms | of bf16 |\n|---|---|---|---|---|")
    for context in CONTEXTS:
        for block_tokens in (context, PAGE_TOKENS):
            times = time_ms([prepare(dtype, context, block_tokens) for dtype in CACHES])
            for dtype, ms in zip(CACHES, times, strict=True):
                name = str(dtype).removeprefix("torch.")
                print(f"| {context} | {block_tokens} | {name} | {ms:.3f} | {ms / times[0]:.2f} |")


if __name__ == "__main__":
    main()
