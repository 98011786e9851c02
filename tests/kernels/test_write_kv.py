from __future__ import annotations

import pytest
import torch

from engine.cache import LayerCache
from engine.kernels.registry import Implementation
from tests.kernels.helpers import DTYPES, cases, random

KV_HEADS, HEAD_DIM = 3, 16


@cases("write_kv")
@DTYPES
@pytest.mark.parametrize("block_tokens", [1, 4, 64])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_writes_its_slots_and_nothing_else(
    impl: Implementation, device: str, dtype: torch.dtype, block_tokens: int, tokens: int
) -> None:
    blocks = 64 // block_tokens
    before = random(2, blocks, KV_HEADS, block_tokens, HEAD_DIM, dtype=dtype, device=device)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:tokens]
    if tokens > 1:
        slots[1] = -1
    fused = random(tokens, 2, KV_HEADS, HEAD_DIM, dtype=dtype, device=device, seed=1)
    layer = LayerCache(*before.clone())
    impl(fused[:, 0], fused[:, 1], layer, slots.to(device))
    expected = before.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            for which in range(2):
                place = expected[which, slot // block_tokens, :, slot % block_tokens]
                place.copy_(fused[token, which])
    assert torch.equal(layer.k, expected[0])
    assert torch.equal(layer.v, expected[1])
