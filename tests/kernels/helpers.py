"""What the kernel tests share: cases, seeded tensors, tolerances, and ragged batches with truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from engine.cache import LayerCache
from engine.kernels import registry
from engine.kernels.api import Attending

# Greatest error as a part of the greatest true value: a few roundings of the dtype.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype)[6:])


# Storage types of a quantised cache, and the largest code of each.
CODES = {torch.int8: 127, torch.float8_e4m3fn: 448}

CODE_DTYPES = pytest.mark.parametrize("codes", CODES, ids=lambda dtype: str(dtype)[6:])


def cases(op: str) -> Any:
    """Parametrises a test by every implementation of `op` on every device present."""
    pairs = [
        pytest.param(impl, device, id=f"{impl}-{device}")
        for device in registry.present_devices()
        for impl in registry.implementations(op, [device])
    ]
    return pytest.mark.parametrize("impl, device", pairs)


def random(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Tensor:
    """Normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def random_codes(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """All codes that a quantised cache stores, equally often."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    for unused in (0x80,) if dtype == torch.int8 else (0x7F, 0xFF):
        bits[bits == unused] = unused - 1
    return bits.view(dtype)


def decode(codes: Tensor) -> Tensor:
    """int8 or float8_e4m3fn → fp64; float8 by its definition (arXiv 2209.05433)."""
    if codes.dtype == torch.int8:
        return codes.double()
    bits = codes.view(torch.uint8).long()
    exponents, fractions = bits >> 3 & 15, (bits & 7) / 8
    subnormal, normal = fractions * 2.0**-6, (1 + fractions) * 2.0 ** (exponents.double() - 7)
    return torch.where(exponents == 0, subnormal, normal) * (1 - 2 * (bits >> 7))


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """What no kernel may use: NaN, or integers that the cache never stores and its largest."""
    if dtype == torch.int8:
        return torch.tensor([127, -128], dtype=dtype).repeat(shape[-1] // 2).expand(shape).clone()
    return torch.full(shape, torch.nan, dtype=dtype)


def assert_close(actual: Tensor, truth: Tensor) -> None:
    """`truth` is fp64; the tolerance is that of the dtype of `actual`."""
    assert actual.shape == truth.shape
    assert actual.isfinite().all()
    error = (actual.cpu().double() - truth.cpu()).abs().max() / truth.abs().max().cpu()
    limit = TOLERANCES[actual.dtype]
    assert error <= limit, f"relative error {error:.1e} exceeds {limit:.1e}"


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int


class Scene(NamedTuple):
    """A ragged batch over a cache, and every sequence's true keys and values, [S, G, D] each."""

    q_THD: Tensor
    layer: LayerCache
    batch: Attending
    keys: list[Tensor]
    values: list[Tensor]


def make_scene(
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    shape: Shape,
    *,
    block_tokens: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    window: int | None = None,
    codes: torch.dtype | None = None,
) -> Scene:
    """Random sequences in shuffled cache blocks; poison wherever no sequence has a valid position.

    With a window, blocks that lie wholly before it are freed: poison, and 0 in the table. With
    `codes` the cache stores that type, with a scale of its own for each head. The values do not
    depend on `block_tokens` nor, for a sequence, on the others' lengths.
    """
    heads, kv_heads, head_dim = shape
    counts = [-(-length // block_tokens) for length in kv_lens]
    free = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    stored_shape = (2, len(free), kv_heads, block_tokens, head_dim)
    storage = poisoned(*stored_shape, dtype=codes or dtype)
    scales_2G = _scales(kv_heads, codes)
    table_BM = torch.zeros(len(kv_lens), max([*counts, 1]) + 2, dtype=torch.int32)
    keys, values, slots = [], [], []
    for b, (query_len, kv_len) in enumerate(zip(query_lens, kv_lens, strict=True)):
        k, v, true_k, true_v = _keys_and_values(
            (kv_len, kv_heads, head_dim), scales_2G, dtype=codes or dtype, seed=100 + b
        )
        keys.append(true_k)
        values.append(true_v)
        kept = 0 if window is None else max(0, kv_len - query_len - window + 1)
        for index in range(kept // block_tokens, counts[b]):
            block, start = free.pop(), index * block_tokens
            table_BM[b, index] = block
            part = slice(start, min(start + block_tokens, kv_len))
            storage[0, block, :, : part.stop - start] = k[part].transpose(0, 1)
            storage[1, block, :, : part.stop - start] = v[part].transpose(0, 1)
        for position in range(kv_len - query_len, kv_len):
            block = int(table_BM[b, position // block_tokens])
            slots.append(block * block_tokens + position % block_tokens)
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    q_THD = torch.cat(
        [random(n, heads, head_dim, dtype=dtype, seed=200 + b) for b, n in enumerate(query_lens)]
    )
    batch = Attending(
        query_lens=tuple(query_lens),
        kv_lens=tuple(kv_lens),
        kv_lens_B=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        query_starts_B1=starts.to(torch.int32).to(device),
        block_table_BM=table_BM.to(device),
        slots_T=torch.tensor(slots, dtype=torch.int64, device=device),
        window=window,
        scale=head_dim**-0.5,
    )
    layer = LayerCache(*storage.to(device), *(scale_G.to(device) for scale_G in scales_2G))
    return Scene(q_THD.to(device), layer, batch, keys, values)


def part_of(batch: Attending, start: int, stop: int, *, window: int | None) -> Attending:
    """The step that has the tokens start … stop - 1 of the one sequence of `batch`."""
    return replace(
        batch,
        query_lens=(stop - start,),
        kv_lens=(stop,),
        kv_lens_B=batch.kv_lens_B.new_tensor([stop]),
        query_starts_B1=batch.query_starts_B1.new_tensor([0, stop - start]),
        slots_T=batch.slots_T[start:stop],
        window=window,
    )


def _scales(kv_heads: int, codes: torch.dtype | None) -> tuple[Tensor, ...]:
    """Scales of keys and of values that make the largest code 3 to 4."""
    if codes is None:
        return ()
    return tuple(3 / CODES[codes] * (1 + random(2, kv_heads, seed=99).abs() / 10))


def _keys_and_values(
    shape: tuple[int, ...], scales_2G: tuple[Tensor, ...], *, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values [S, G, D] as they are stored, and their true ones."""
    if not scales_2G:
        k, v = random(2, *shape, dtype=dtype, seed=seed)
        return k, v, k, v
    k, v = random_codes(2, *shape, dtype=dtype, seed=seed)
    true_k, true_v = (
        decode(x) * scale_G.double()[:, None] for x, scale_G in zip((k, v), scales_2G, strict=True)
    )
    return k, v, true_k, true_v


def eager_attention(scene: Scene) -> Tensor:
    """The arithmetic of transformers' eager attention, written out in fp64: [T, H, D]."""
    outputs = []
    queries = scene.q_THD.cpu().double().split(scene.batch.query_lens)
    for q, k, v in zip(queries, scene.keys, scene.values, strict=True):
        repeats = q.shape[1] // k.shape[1]
        k_HSD = k.double().transpose(0, 1).repeat_interleave(repeats, dim=0)
        v_HSD = v.double().transpose(0, 1).repeat_interleave(repeats, dim=0)
        scores = q.transpose(0, 1) @ k_HSD.transpose(1, 2) * scene.batch.scale
        mask = torch.zeros(len(q), len(k), dtype=torch.float64)
        for row in range(len(q)):
            position = len(k) - len(q) + row
            mask[row, position + 1 :] = -torch.inf
            if scene.batch.window is not None:
                mask[row, : max(0, position - scene.batch.window + 1)] = -torch.inf
        exps = torch.exp(scores + mask - (scores + mask).amax(-1, keepdim=True))
        outputs.append((exps / exps.sum(-1, keepdim=True) @ v_HSD).transpose(0, 1))
    return torch.cat(outputs)
