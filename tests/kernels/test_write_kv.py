from __future__ import annotations

import pytest
import torch

from engine.cache import LayerCache
from engine.kernels.registry import Implementation
from tests.kernels.helpers import CODE_DTYPES, DTYPES, cases, decode, poisoned, random

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


# Values in units of the scale and their codes: ties, subnormals, saturation.
ROUNDED = {
    torch.int8: {
        0.5: 0, 1.5: 2, 2.5: 2, -0.5: 0, -1.5: -2, 2.51: 3, 126.5: 126, 127.4: 127, 127.6: 127,
        -127.6: -127, -128: -127, 1e6: 127, torch.inf: 127, -torch.inf: -127,
    },
    torch.float8_e4m3fn: {
        1: 1, 17: 16, 19: 20, -17: -16, 17.01: 18, 432: 448, 431: 416, 448: 448, 465: 448, 1e6: 448,
        -1e6: -448, torch.inf: 448, 2**-9: 2**-9, 2**-10: 0, 3 * 2**-10: 2**-8, -(2**-7): -(2**-7),
    },
}  # fmt: skip


@cases("write_kv")
@CODE_DTYPES
@pytest.mark.parametrize("tokens", [1, 9])
def test_codes_are_rounded_half_to_even_and_saturate(
    impl: Implementation, device: str, codes: torch.dtype, tokens: int
) -> None:
    rounded = ROUNDED[codes]
    layer = code_layer(codes, blocks=3, block_tokens=4, head_dim=len(rounded), device=device)
    values_D = torch.tensor(list(rounded), device=device)
    k_TGD = (values_D * layer.k_scale_G[:, None]).expand(tokens, -1, -1)
    v_TGD = (-values_D * layer.v_scale_G[:, None]).expand(tokens, -1, -1)
    impl(k_TGD, v_TGD, layer, torch.arange(tokens, device=device))
    expected = torch.tensor([float(code) for code in rounded.values()]).double()
    for token in range(tokens):
        for head in range(KV_HEADS):
            place = (token // 4, head, token % 4)
            assert decode(layer.k.cpu()[place]).tolist() == expected.tolist()
            assert decode(layer.v.cpu()[place]).tolist() == (-expected).tolist()


@cases("write_kv")
@DTYPES
@CODE_DTYPES
@pytest.mark.parametrize("tokens", [3, 40])
def test_codes_go_to_their_slots_and_nowhere_else(
    impl: Implementation, device: str, dtype: torch.dtype, codes: torch.dtype, tokens: int
) -> None:
    layer = code_layer(codes, blocks=16, block_tokens=4, head_dim=HEAD_DIM, device=device)
    untouched = layer.k.cpu().view(torch.uint8).clone()
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:tokens]
    slots[1] = -1
    k_TGD, v_TGD = random(2, tokens, KV_HEADS, HEAD_DIM, dtype=dtype, device=device)
    impl(k_TGD, v_TGD, layer, slots.to(device))
    written = [(token, divmod(slot, 4)) for token, slot in enumerate(slots.tolist()) if slot >= 0]
    for x_TGD, stored, scale_G in ((k_TGD, *layer[::2]), (v_TGD, *layer[1::2])):
        stored = stored.cpu()
        # Half a step of int8; of float8 half of its 3 bits of fraction.
        step_G1 = scale_G.cpu().double()[:, None] / 2
        for token, (block, offset) in written:
            true_GD = x_TGD[token].cpu().double()
            found_GD = decode(stored[block, :, offset]) * scale_G.cpu().double()[:, None]
            limit = step_G1 if codes == torch.int8 else true_GD.abs() / 16 + step_G1 * 2**-9
            assert ((found_GD - true_GD).abs() <= limit * 1.001).all()
            stored.view(torch.uint8)[block, :, offset] = untouched[block, :, offset]
        assert torch.equal(stored.view(torch.uint8), untouched)


def code_layer(
    codes: torch.dtype, *, blocks: int, block_tokens: int, head_dim: int, device: str
) -> LayerCache:
    """Unwritten memory; every head of keys and of values has a scale of its own."""
    stored = poisoned(2, blocks, KV_HEADS, block_tokens, head_dim, dtype=codes).to(device)
    # Powers of two, by which the values of these tests are divided exactly.
    scales = 2.0 ** torch.arange(-3, 2 * KV_HEADS - 3, device=device).view(2, KV_HEADS)
    return LayerCache(*stored, *scales)
