from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from engine.cache import LayerCache
from engine.kernels import cpu, reference
from engine.kernels.registry import Implementation
from tests.kernels.helpers import (
    CODES,
    DTYPES,
    TOLERANCES,
    Shape,
    assert_close,
    cases,
    eager_attention,
    make_scene,
    part_of,
)
from tests.kernels.rope_scenes import make_rope_scene

SMALL, YI = Shape(4, 2, 64), Shape(32, 4, 128)

# Shape and window; windows of one token, within and across blocks, and longer than any sequence.
PAIRS = [
    (SMALL, None),
    (SMALL, 1),
    (SMALL, 64),
    (SMALL, 1000),
    (YI, None),
    (YI, 9),
    (Shape(8, 1, 64), 9),
    (Shape(6, 6, 16), None),
]

# Prompts, a chunk of a prompt, decoding rows and an idle one.
QUERY_LENS = (1, 7, 130, 1, 5, 0)
KV_LENS = (1, 7, 130, 77, 40, 12)


@cases("attention")
@DTYPES
@pytest.mark.parametrize("shape, window", PAIRS, ids=str)
def test_agrees_with_eager_arithmetic(
    impl: Implementation, device: str, dtype: torch.dtype, shape: Shape, window: int | None
) -> None:
    options = {"dtype": dtype, "device": device, "window": window}
    scene = make_scene(QUERY_LENS, KV_LENS, shape, block_tokens=16, **options)
    assert_close(impl(scene.q_THD, scene.layer, scene.batch), eager_attention(scene))


@cases("attention")
@pytest.mark.parametrize("length", [1, 2, 33, 300])
def test_a_whole_prompt_agrees_with_torch(impl: Implementation, device: str, length: int) -> None:
    scene = make_scene((length,), (length,), SMALL, block_tokens=64, device=device)
    q, k, v = (x.transpose(0, 1).double() for x in (scene.q_THD, scene.keys[0], scene.values[0]))
    truth = F.scaled_dot_product_attention(q.cpu(), k, v, is_causal=True, enable_gqa=True)
    assert_close(impl(scene.q_THD, scene.layer, scene.batch), truth.transpose(0, 1))


@cases("attention")
@DTYPES
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("block_tokens", [4, 16])
def test_paged_gives_the_bits_of_contiguous(
    impl: Implementation, device: str, dtype: torch.dtype, window: int | None, block_tokens: int
) -> None:
    options = {"dtype": dtype, "device": device, "window": window}
    paged = make_scene(QUERY_LENS, KV_LENS, SMALL, block_tokens=block_tokens, **options)
    whole = make_scene(QUERY_LENS, KV_LENS, SMALL, block_tokens=140, **options)
    assert torch.equal(
        impl(paged.q_THD, paged.layer, paged.batch), impl(whole.q_THD, whole.layer, whole.batch)
    )


@cases("attention")
@DTYPES
def test_a_batch_gives_the_bits_of_each_alone(
    impl: Implementation, device: str, dtype: torch.dtype
) -> None:
    options = {"block_tokens": 16, "dtype": dtype, "device": device}
    scene = make_scene(QUERY_LENS, KV_LENS, SMALL, **options)
    together = impl(scene.q_THD, scene.layer, scene.batch).split(QUERY_LENS)
    for last in range(len(KV_LENS)):
        # A scene's values depend on a sequence's place, so idle rows stand for those before it.
        query_lens = tuple(n if b == last else 0 for b, n in enumerate(QUERY_LENS[: last + 1]))
        alone = make_scene(query_lens, KV_LENS[: last + 1], SMALL, **options)
        assert torch.equal(impl(alone.q_THD, alone.layer, alone.batch), together[last])


@cases("attention")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("chunk", [1, 16, 50])
def test_chunked_prefill_equals_whole(
    impl: Implementation, device: str, window: int | None, chunk: int
) -> None:
    length = 130
    scene = make_scene((length,), (length,), SMALL, block_tokens=16, device=device)
    truth = eager_attention(scene._replace(batch=replace(scene.batch, window=window)))
    outputs = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        part = part_of(scene.batch, start, stop, window=window)
        outputs.append(impl(scene.q_THD[start:stop], scene.layer, part))
    assert_close(torch.cat(outputs), truth)


@pytest.mark.parametrize("window", [None, 20])
def test_parts_of_a_long_prompt_join(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(cpu, "PROMPT_TOKENS", 9)
    monkeypatch.setattr(reference, "MAX_QUERIES", 9)
    scene = make_scene(QUERY_LENS, KV_LENS, SMALL, block_tokens=16, window=window)
    truth = eager_attention(scene)
    assert_close(cpu.attention(scene.q_THD, scene.layer, scene.batch), truth)
    assert_close(reference.attention(scene.q_THD, scene.layer, scene.batch), truth)


def test_masks_of_a_long_prompt_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, masks = 2**10, []
    original = cpu._mask

    def record(*args: int) -> torch.Tensor:
        masks.append(original(*args))
        return masks[-1]

    monkeypatch.setattr(cpu, "MASK_ELEMENTS", limit)
    monkeypatch.setattr(cpu, "_mask", record)
    scene = make_scene((130,), (130,), SMALL, block_tokens=16)
    assert_close(cpu.attention(scene.q_THD, scene.layer, scene.batch), eager_attention(scene))
    assert masks and max(mask.numel() for mask in masks) <= limit


@cases("attention")
def test_strided_queries(impl: Implementation, device: str) -> None:
    """q as the layers pass it without rope: a view of the fused projection."""
    scene = make_scene(QUERY_LENS, KV_LENS, SMALL, block_tokens=16, device=device)
    fused = torch.cat([scene.q_THD, scene.q_THD], dim=1)
    view = fused[:, : scene.q_THD.shape[1]]
    assert not view.is_contiguous()
    assert_close(impl(view, scene.layer, scene.batch), eager_attention(scene))


@cases("rope_attention")
@DTYPES
@pytest.mark.parametrize("codes", [None, *CODES], ids=str)
@pytest.mark.parametrize("query_lens", [QUERY_LENS, (1,) * len(KV_LENS)], ids=["mixed", "once"])
def test_rope_attention_agrees_with_eager_arithmetic(
    impl: Implementation,
    device: str,
    dtype: torch.dtype,
    codes: torch.dtype | None,
    query_lens: tuple[int, ...],
) -> None:
    """New keys and values are rotated, cached as `write_kv` does, and seen."""
    options = {"dtype": dtype, "device": device, "codes": codes, "window": 64}
    scene = make_rope_scene(query_lens, KV_LENS, SMALL, block_tokens=16, **options)
    truth = LayerCache(*(x if x is None else x.clone() for x in scene.layer))
    _, k_TGD = reference.rope(scene.q_THD, scene.k_TGD, scene.cos_TC, scene.sin_TC)
    reference.write_kv(k_TGD, scene.v_TGD, truth, scene.rotated.batch.slots_T)
    assert_close(impl(*scene.arguments()), eager_attention(scene.rotated))
    # Where an angle's products round otherwise, a code may be its neighbour.
    limits = {"rtol": 0.13, "atol": 1} if codes else {"rtol": 0, "atol": 4 * TOLERANCES[dtype]}
    for ours, true in zip(scene.layer[:2], truth[:2], strict=True):
        torch.testing.assert_close(ours.float(), true.float(), equal_nan=True, **limits)
