"""Attention and the row-wise kernels on this GPU, against PyTorch's and the memory's speed.

    python -m benchmarks.attention_kernels [--quick] [--pdl]

Correctness comes first: a result further from fp32 arithmetic than a few roundings stops the run.
Times are of CUDA graphs in which the calls of several layers follow each other, each on a cache
of its own, together larger than the second-level cache; the least of several replays counts. The
limit is the bandwidth of a large copy, measured in the same run. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.cache import LayerCache
from engine.kernels import api as ops
from engine.kernels import reference
from engine.kernels.api import Attending
from engine.kernels.triton import _launch
from engine.kernels.triton._prefill import prefill
from engine.kernels.triton._softmax import NO_WINDOW

HEADS = {"6b": (32, 4), "34b": (56, 8)}
WIDTHS = {"6b": (4096, 11008), "34b": (7168, 20480)}
HEAD_DIM, BLOCK = 128, 64
BATCHES, CONTEXTS = (1, 8, 64), (1024, 4096)
PROMPTS = ((1, 2048), (8, 2048))
CODES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
CACHE_BYTES, MAX_LAYERS = 200e6, 64
REPLAYS, COPIED_BYTES = 10, 2**30
TOLERANCE = 1.6e-2
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Call = Callable[[], object]


def time_us(calls: Sequence[Call]) -> float:
    """Microseconds of one of the calls, captured one after the other in a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (calls[0], *calls):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return min(times)


def copy_bandwidth() -> float:
    """Bytes a second read and written by a large copy."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2e6 * COPIED_BYTES / time_us([lambda: target.copy_(source)] * 4)


def make_cache(sequences: int, length: int, kv_heads: int, block: int, codes: str) -> LayerCache:
    shape = (2, sequences * -(-length // block), kv_heads, block, HEAD_DIM)
    dtype = CODES[codes]
    if dtype == torch.bfloat16:
        return LayerCache(*torch.randn(shape, dtype=dtype, device="cuda"))
    if dtype == torch.int8:
        stored = torch.randint(-127, 128, shape, dtype=dtype, device="cuda")
    else:
        numbers = torch.randn(shape, dtype=torch.bfloat16, device="cuda").mul_(100)
        stored = numbers.clamp_(-448, 448).to(dtype)
    scale = torch.full((kv_heads,), 0.01, device="cuda")
    return LayerCache(*stored, scale, scale)


def make_batch(sequences: int, query_len: int, length: int, block: int) -> Attending:
    columns = -(-length // block)
    table = torch.arange(sequences * columns, dtype=torch.int32, device="cuda")
    starts = torch.arange(sequences + 1, dtype=torch.int32, device="cuda") * query_len
    # Blocks lie in the order of the positions.
    ends = torch.arange(length - query_len, length, device="cuda")
    slots = torch.arange(sequences, device="cuda")[:, None] * (columns * block) + ends
    return Attending(
        query_lens=(query_len,) * sequences,
        kv_lens=(length,) * sequences,
        kv_lens_B=torch.full((sequences,), length, dtype=torch.int32, device="cuda"),
        query_starts_B1=starts,
        block_table_BM=table.view(sequences, columns),
        slots_T=slots.flatten(),
        window=None,
        scale=HEAD_DIM**-0.5,
    )


def make_rows(
    tokens: int, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """q, k and v of the fused projection, and cos and sin of some angles."""
    shape = (tokens, heads + 2 * kv_heads, HEAD_DIM)
    qkv = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    angles = 6.3 * torch.rand(tokens, HEAD_DIM // 2, device="cuda")
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v, (angles.cos(), angles.sin())


def contiguous(
    stored: Tensor, scale_G: Tensor | None, sequences: int, dtype: torch.dtype
) -> Tensor:
    """Keys or values as [B, G, S, D] of numbers."""
    blocks, kv_heads, block, dim = stored.shape
    numbers = stored.to(dtype)
    if scale_G is not None:
        numbers = numbers * scale_G[:, None, None].to(dtype)
    paged = numbers.view(sequences, blocks // sequences, kv_heads, block, dim).transpose(1, 2)
    return paged.reshape(sequences, kv_heads, -1, dim)


def check(actual: Tensor, q_THD: Tensor, layer: LayerCache, sequences: int) -> None:
    """The first and the last sequence against fp32 arithmetic."""
    q_BHSD = q_THD.unflatten(0, (sequences, -1)).transpose(1, 2)
    o_BHSD = actual.unflatten(0, (sequences, -1)).transpose(1, 2)
    k = contiguous(layer.k, layer.k_scale_G, sequences, torch.float32)
    v = contiguous(layer.v, layer.v_scale_G, sequences, torch.float32)
    for b in {0, sequences - 1}:
        group = q_BHSD.shape[1] // k.shape[1]
        keys, values = (x[b].repeat_interleave(group, dim=0) for x in (k, v))
        scores = q_BHSD[b].float() @ keys.mT * HEAD_DIM**-0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device="cuda")
        hidden = hidden.triu(scores.shape[2] - scores.shape[1] + 1)
        truth = scores.masked_fill_(hidden, -torch.inf).softmax(-1) @ values
        error = ((o_BHSD[b] - truth).abs().max() / truth.abs().max()).item()
        assert error <= TOLERANCE, f"attention is wrong by {error:.1e}"


class Decoding(NamedTuple):
    model: str
    codes: str
    block: int
    batch: int
    context: int


def measure_decoding(case: Decoding, copy: float) -> dict[str, Any]:
    heads, kv_heads = HEADS[case.model]
    block = case.block or case.context
    nbytes = 2 * case.batch * case.context * kv_heads * HEAD_DIM * CODES[case.codes].itemsize
    layers = max(1, min(MAX_LAYERS, int(CACHE_BYTES / nbytes) + 1))
    caches = [
        make_cache(case.batch, case.context, kv_heads, block, case.codes) for _ in range(layers)
    ]
    batch = make_batch(case.batch, 1, case.context, block)
    q, k, v, angles = make_rows(case.batch, heads, kv_heads)
    o_THD = ops.rope_attention(q, k, v, *angles, caches[0], batch)
    check(o_THD, reference.rope(q, k, *angles)[0], caches[0], case.batch)
    calls = [partial(ops.rope_attention, q, k, v, *angles, cache, batch) for cache in caches]
    time = time_us(calls)
    record = case._asdict() | {
        "us": round(time, 2),
        "GB/s": round(nbytes / time / 1e3),
        "copy_share": round(nbytes / time * 1e6 / copy, 3),
    }
    if case.codes == "bf16":
        record["sdpa_us"] = round(time_us(sdpa_decoding(q, caches, case.batch)), 2)
    return record


def sdpa_decoding(q_THD: Tensor, caches: list[LayerCache], sequences: int) -> list[Call]:
    """PyTorch's attention with the heads of a group as query positions: its faster form."""
    q_BGRD = q_THD.unflatten(1, (caches[0].k.shape[1], -1))
    pairs = [[contiguous(x, None, sequences, x.dtype) for x in cache[:2]] for cache in caches]
    return [partial(F.scaled_dot_product_attention, q_BGRD, k, v) for k, v in pairs]


def measure_prompts(model: str, sequences: int, length: int) -> dict[str, Any]:
    """TFLOP/s of what attention chooses, of the Triton kernel alone and of each backend."""
    heads, kv_heads = HEADS[model]
    batch = make_batch(sequences, length, length, BLOCK)
    whole = make_batch(sequences, length, length, length)
    shape = (sequences * length, heads, HEAD_DIM)
    q_THD = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    out_THD = torch.empty_like(q_THD)
    flops = 2 * sequences * heads * HEAD_DIM * length * (length + 1)
    record: dict[str, Any] = {"model": model, "batch": sequences, "prompt": length}
    for codes in CODES:
        layer = make_cache(sequences, length, kv_heads, BLOCK, codes)
        call = partial(prefill, out_THD, q_THD, layer, batch, NO_WINDOW)
        call()
        check(out_THD, q_THD, layer, sequences)
        record[f"triton {codes}"] = round(flops / time_us([call] * 4) / 1e6)
    layer = make_cache(sequences, length, kv_heads, length, "bf16")
    check(ops.attention(q_THD, layer, whole), q_THD, layer, sequences)
    record["chosen"] = round(
        flops / time_us([partial(ops.attention, q_THD, layer, whole)] * 4) / 1e6
    )
    q_BHSD = q_THD.unflatten(0, (sequences, length)).transpose(1, 2)
    for name, backend in BACKENDS.items():
        record[name] = measure_backend(backend, q_BHSD, layer, flops)
    return record


def measure_backend(
    backend: SDPBackend, q_BHSD: Tensor, layer: LayerCache, flops: float
) -> int | None:
    """TFLOP/s of one of PyTorch's kernels; None where it does not take the shape."""
    run = partial(
        F.scaled_dot_product_attention, q_BHSD, layer.k, layer.v, is_causal=True, enable_gqa=True
    )
    try:
        with sdpa_kernel(backend):
            return round(flops / time_us([run] * 4) / 1e6)
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def measure_rows(model: str, tokens: int) -> dict[str, Any]:
    """Microseconds of the kernels that treat each token alone."""
    (heads, kv_heads), (width, ffn) = HEADS[model], WIDTHS[model]
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(tokens, width, **options)
    weight = torch.randn(width, **options)
    gate_up = torch.randn(tokens, 2 * ffn, **options)
    q, k, v, angles = make_rows(tokens, heads, kv_heads)
    slots = torch.arange(tokens, device="cuda")
    calls: dict[str, Call] = {
        "rms_norm": partial(ops.rms_norm, x, weight, 1e-5),
        "silu_mul": partial(ops.silu_mul, gate_up),
    }
    for codes in CODES:
        layer = make_cache(1, max(tokens, BLOCK), kv_heads, BLOCK, codes)
        calls[f"rope_write_kv {codes}"] = partial(ops.rope_write_kv, q, k, v, *angles, layer, slots)
    record: dict[str, Any] = {"model": model, "tokens": tokens}
    return record | {name: round(time_us([call] * 32), 2) for name, call in calls.items()}


def show(record: dict[str, Any]) -> dict[str, Any]:
    print("  ".join(f"{name} {value}" for name, value in record.items()), flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="Yi-6B alone, 16-bit and fp8 caches")
    parser.add_argument("--pdl", action="store_true", help="with programmatic dependent launch")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.attention_kernels needs a GPU")
    _launch.PDL = args.pdl
    torch.manual_seed(0)
    models = ("6b",) if args.quick else tuple(HEADS)
    codes = ("bf16", "fp8") if args.quick else tuple(CODES)
    with torch.inference_mode():
        copy = copy_bandwidth()
        name = torch.cuda.get_device_name()
        print(f"{name}, torch {torch.__version__}, copies {copy / 1e9:.0f} GB/s", flush=True)
        cases = [
            Decoding(model, code, block, batch, context)
            for model in models
            for code in codes
            for block in (BLOCK, 0)
            for batch in BATCHES
            for context in CONTEXTS
        ]
        decoding = [show(measure_decoding(case, copy)) for case in cases]
        prompts = [show(measure_prompts(model, *work)) for model in models for work in PROMPTS]
        rows = [show(measure_rows(model, tokens)) for model in models for tokens in (1, 64)]
    document = {
        "device": name,
        "torch": torch.__version__,
        "pdl": args.pdl,
        "copy_GB/s": round(copy / 1e9),
        "decoding": decoding,
        "prompts": prompts,
        "rows": rows,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
