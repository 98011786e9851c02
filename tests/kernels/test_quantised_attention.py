"""Attention over a cache of codes; the truth is fp64 arithmetic on their values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.kernels import cpu
from engine.kernels.registry import Implementation
from tests.kernels.helpers import (
    CODE_DTYPES,
    DTYPES,
    Shape,
    assert_close,
    cases,
    decode,
    eager_attention,
    make_scene,
    part_of,
)

SMALL, YI = Shape(4, 2, 64), Shape(32, 4, 128)

# Prompts, a chunk of a prompt, decoding rows and an idle one.
QUERY_LENS = (1, 7, 130, 1, 5, 0)
KV_LENS = (1, 7, 130, 77, 40, 12)


@cases("attention")
@CODE_DTYPES
@DTYPES
@pytest.mark.parametrize(
    "shape, window",
    [(SMALL, None), (SMALL, 1), (SMALL, 64), (YI, None), (YI, 9), (Shape(8, 1, 64), 1000)],
    ids=str,
)
def test_agrees_with_eager_arithmetic(
    impl: Implementation,
    device: str,
    codes: torch.dtype,
    dtype: torch.dtype,
    shape: Shape,
    window: int | None,
) -> None:
    options = {"dtype": dtype, "device": device, "window": window, "codes": codes}
    scene = make_scene(QUERY_LENS, KV_LENS, shape, block_tokens=16, **options)
    assert_close(impl(scene.q_THD, scene.layer, scene.batch), eager_attention(scene))


@cases("attention")
@CODE_DTYPES
@pytest.mark.parametrize("window", [None, 11])
def test_paged_gives_the_bits_of_contiguous(
    impl: Implementation, device: str, codes: torch.dtype, window: int | None
) -> None:
    options = {"dtype": torch.bfloat16, "device": device, "window": window, "codes": codes}
    paged = make_scene(QUERY_LENS, KV_LENS, SMALL, block_tokens=16, **options)
    whole = make_scene(QUERY_LENS, KV_LENS, SMALL, block_tokens=140, **options)
    assert torch.equal(
        impl(paged.q_THD, paged.layer, paged.batch), impl(whole.q_THD, whole.layer, whole.batch)
    )


@cases("attention")
@CODE_DTYPES
def test_a_batch_gives_the_bits_of_each_alone(
    impl: Implementation, device: str, codes: torch.dtype
) -> None:
    options = {"block_tokens": 16, "device": device, "codes": codes}
    scene = make_scene(QUERY_LENS, KV_LENS, SMALL, **options)
    together = impl(scene.q_THD, scene.layer, scene.batch).split(QUERY_LENS)
    for last in range(len(KV_LENS)):
        # A scene's values depend on a sequence's place, so idle rows stand for those before it.
        query_lens = tuple(n if b == last else 0 for b, n in enumerate(QUERY_LENS[: last + 1]))
        alone = make_scene(query_lens, KV_LENS[: last + 1], SMALL, **options)
        assert torch.equal(impl(alone.q_THD, alone.layer, alone.batch), together[last])


@cases("attention")
@CODE_DTYPES
@pytest.mark.parametrize("window, chunk", [(None, 1), (20, 16), (None, 50)])
def test_chunked_prefill_equals_whole(
    impl: Implementation, device: str, codes: torch.dtype, window: int | None, chunk: int
) -> None:
    length = 130
    scene = make_scene((length,), (length,), SMALL, block_tokens=16, device=device, codes=codes)
    truth = eager_attention(scene._replace(batch=replace(scene.batch, window=window)))
    outputs = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        part = part_of(scene.batch, start, stop, window=window)
        outputs.append(impl(scene.q_THD[start:stop], scene.layer, part))
    assert_close(torch.cat(outputs), truth)


@CODE_DTYPES
@pytest.mark.parametrize("positions", [1, 7, 64])
@pytest.mark.parametrize("window", [None, 50])
def test_pieces_of_a_long_context_join(
    monkeypatch: pytest.MonkeyPatch, codes: torch.dtype, positions: int, window: int | None
) -> None:
    monkeypatch.setattr(cpu, "WIDENED_ELEMENTS", positions * SMALL.kv_heads * SMALL.head_dim)
    lengths = (1, 64, 65, 200)
    scene = make_scene((1,) * 4, lengths, SMALL, block_tokens=16, codes=codes, window=window)
    assert_close(cpu.attention(scene.q_THD, scene.layer, scene.batch), eager_attention(scene))


def test_every_float8_is_widened_exactly() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    codes = bits[(bits & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    assert len(codes) == 254
    assert torch.equal(cpu.fp8_as_fp16(codes).double() / cpu.FP8_FACTOR, decode(codes))
