"""Triton's attention kernels: on the GPU, or in the interpreter, against fp64 arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.cache import LayerCache
from engine.kernels import reference
from tests.kernels.helpers import (
    CODE_DTYPES,
    DTYPES,
    Scene,
    Shape,
    assert_close,
    eager_attention,
    make_scene,
)
from tests.kernels.rope_scenes import RopeScene, make_rope_scene
from tests.kernels.triton_mode import DEVICE, prepare_interpreter, run_compiled

prepare_interpreter()

from engine.kernels.triton import _codes, _decode, attention  # noqa: E402
from engine.kernels.triton._split import MANY_PARTS, MAX_JOINED, plan_split  # noqa: E402
from engine.kernels.triton.rope_attention import rope_attention  # noqa: E402

# Groups of seven heads, as Yi-34B's, and of more than a tile's least rows; odd head sizes.
SHAPES = pytest.mark.parametrize(
    "shape", [Shape(7, 1, 16), Shape(8, 2, 32), Shape(20, 1, 24), Shape(2, 2, 64)], ids=str
)
WINDOWS = pytest.mark.parametrize("window", [None, 1, 70])
LENGTHS = (1, 130, 64, 257)

# Prompts, a chunk of a prompt, decoding rows, an idle one, and neighbours of one length.
QUERY_LENS = (1, 7, 70, 1, 5, 0, 40, 40)
KV_LENS = (1, 7, 70, 77, 140, 12, 40, 40)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN, its workspace included."""
    empty = torch.empty

    def filled(*shape: object, **options: object) -> Tensor:
        return empty(*shape, **options).fill_(torch.nan)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", filled)


def decoding(
    shape: Shape, lengths: tuple[int, ...] = LENGTHS, *, block_tokens: int = 16, **options: object
) -> RopeScene:
    ones = (1,) * len(lengths)
    return make_rope_scene(
        ones, lengths, shape, block_tokens=block_tokens, device=DEVICE, **options
    )


def mixed(shape: Shape, *, block_tokens: int = 16, **options: object) -> Scene:
    return make_scene(
        QUERY_LENS, KV_LENS, shape, block_tokens=block_tokens, device=DEVICE, **options
    )


def run(scene: Scene) -> Tensor:
    return attention.attention(scene.q_THD, scene.layer, scene.batch)


def check_decoding(scene: RopeScene) -> Tensor:
    """The output against fp64 arithmetic, and the cache against the plain implementation's."""
    truth = LayerCache(*(x if x is None else x.clone() for x in scene.layer))
    _, k_TGD = reference.rope(scene.q_THD, scene.k_TGD, scene.cos_TC, scene.sin_TC)
    reference.write_kv(k_TGD, scene.v_TGD, truth, scene.rotated.batch.slots_T)
    o_THD = rope_attention(*scene.arguments())
    assert_close(o_THD, eager_attention(scene.rotated))
    for ours, true in zip(scene.layer[:2], truth[:2], strict=True):
        assert torch.equal(ours.contiguous().view(torch.uint8), true.view(torch.uint8))
    return o_THD


@DTYPES
@SHAPES
@WINDOWS
def test_decoding(dtype: torch.dtype, shape: Shape, window: int | None) -> None:
    check_decoding(decoding(shape, dtype=dtype, window=window))


@DTYPES
@CODE_DTYPES
@pytest.mark.parametrize("has_float8", [True, False])
def test_decoding_with_codes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, codes: torch.dtype, has_float8: bool
) -> None:
    """Without float8 conversions, as on Ampere, codes become numbers by arithmetic on bits."""
    if not has_float8:
        monkeypatch.setattr(_decode, "has_float8", lambda device: False)
    check_decoding(decoding(Shape(7, 1, 16), dtype=dtype, codes=codes))


@pytest.mark.parametrize("window", [None, 70])
def test_blocks_do_not_change_bits(window: int | None) -> None:
    for make in (decoding, mixed):
        options = {"dtype": torch.bfloat16, "window": window}
        outputs = []
        # Blocks within a tile, of two tiles, and a whole sequence.
        for block_tokens in (4, 128, 300):
            scene = make(Shape(4, 1, 16), block_tokens=block_tokens, **options)
            rotated = scene if isinstance(scene, Scene) else scene.rotated
            if block_tokens == 300:
                # One column in the table is the contiguous cache.
                column = rotated.batch.block_table_BM[:, :1].contiguous()
                rotated = rotated._replace(batch=replace(rotated.batch, block_table_BM=column))
            if isinstance(scene, Scene):
                outputs.append(run(rotated))
            else:
                outputs.append(rope_attention(*scene._replace(rotated=rotated).arguments()))
        assert all(torch.equal(o_THD, outputs[0]) for o_THD in outputs)


@pytest.mark.parametrize("window", [None, 9])
def test_one_launch_serves_every_length_up_to_its_bound(window: int | None) -> None:
    """As a captured graph keeps it: bounds on the host, lengths and padding on the device."""
    lengths = (*LENGTHS, 1)
    scene = decoding(Shape(7, 1, 16), lengths, dtype=torch.float16, window=window)
    batch, rows = scene.rotated.batch, len(lengths)
    bound = replace(
        batch,
        kv_lens=(1000,) * rows,
        kv_lens_B=torch.tensor([*LENGTHS, 0], dtype=torch.int32, device=DEVICE),
        slots_T=batch.slots_T.index_fill(0, torch.tensor(rows - 1, device=DEVICE), -1),
        is_bound=True,
    )
    before = scene.layer.k.clone()
    o_THD = rope_attention(*scene.arguments()[:-1], bound)
    assert_close(o_THD[:-1], eager_attention(scene.rotated)[:-1])
    # The last row is padding: it has no place in the cache and a finite output.
    assert o_THD[-1].eq(0).all()
    is_new = (before.view(torch.int16) != scene.layer.k.view(torch.int16)).any(-1)
    assert is_new.transpose(1, 2).flatten()[bound.slots_T[:-1]].all()
    assert is_new.sum() == rows - 1


def test_parts_of_many_lengths_join() -> None:
    """One launch after the other, from one part to more than are joined at a time."""
    for length in (1, 2, 65, 129, 64 * (MANY_PARTS + 2)):
        check_decoding(decoding(Shape(2, 1, 16), (length, 1, 100), block_tokens=64))


def test_splits_fill_the_processors_and_leave_nothing_out() -> None:
    for pairs in (1, 4, 8, 100, 256, 264, 512, 5000):
        for bound in (1, 2, 64, 65, 66, 1000, 4096, 200_000):
            split = plan_split(pairs, bound, 64, 132)
            assert split.positions % 64 == 0 and split.parts * split.positions >= bound - 1
            assert (split.parts - 1) * split.positions < max(bound - 1, 1)
            assert split.parts == 1 or split.parts * pairs <= MAX_JOINED
    # Yi-6B and Yi-34B on 132 processors: one sequence of 1k is cut to single tiles, 64 are whole.
    assert plan_split(4, 1025, 64, 132)[:2] == plan_split(8, 1025, 64, 132)[:2] == (16, 64)
    assert plan_split(64 * 4, 1024, 64, 132).parts == plan_split(64 * 8, 1024, 64, 132).parts == 1


@DTYPES
@pytest.mark.parametrize(
    "shape, window",
    [(Shape(7, 1, 16), None), (Shape(7, 1, 16), 70), (Shape(8, 2, 24), 1), (Shape(8, 2, 24), 9)],
    ids=str,
)
def test_mixed_batches(dtype: torch.dtype, shape: Shape, window: int | None) -> None:
    scene = mixed(shape, dtype=dtype, window=window)
    assert_close(run(scene), eager_attention(scene))


@DTYPES
@CODE_DTYPES
def test_mixed_batches_with_codes(dtype: torch.dtype, codes: torch.dtype) -> None:
    scene = mixed(Shape(7, 1, 16), dtype=dtype, codes=codes)
    assert_close(run(scene), eager_attention(scene))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_tokens", [16, 80])
def test_whole_prompts_by_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block_tokens: int
) -> None:
    """Long prompts go to PyTorch, neighbours of one length together; the rest stays."""
    monkeypatch.setattr(attention, "WHOLE_FROM", 40)
    calls = []
    original = attention._whole_prompts

    def record(*args: object) -> Tensor:
        calls.append((args[3].count, args[3].length))
        return original(*args)

    monkeypatch.setattr(attention, "_whole_prompts", record)
    scene = mixed(Shape(8, 2, 32), dtype=dtype, block_tokens=block_tokens)
    assert_close(run(scene), eager_attention(scene))
    assert calls == [(1, 70), (2, 40)]
    calls.clear()
    alone = make_scene(
        (45, 45), (45, 45), Shape(8, 2, 32), block_tokens=block_tokens, dtype=dtype, device=DEVICE
    )
    assert_close(run(alone), eager_attention(alone))
    assert calls == [(2, 45)]


def test_neighbouring_blocks_are_not_copied() -> None:
    stored = torch.zeros(6, 2, 8, 4, device=DEVICE)
    whole = mixed(Shape(2, 2, 16)).batch
    stored += torch.arange(6, device=DEVICE)[:, None, None, None]

    def gather(*rows: tuple[int, int], length: int) -> Tensor:
        # The sequence before these is not asked for.
        table_BM = torch.tensor([(5, 5), *rows], dtype=torch.int32, device=DEVICE)
        lens = (length,) * len(table_BM)
        batch = replace(whole, query_lens=lens, kv_lens=lens, block_table_BM=table_BM)
        return attention._gather(stored, batch, slice(1, 3), length)

    view = gather((2, 0), (3, 0), length=7)
    assert view.data_ptr() == stored[2].data_ptr() and view.shape == (2, 2, 7, 4)
    copied = gather((3, 0), (2, 0), length=7)
    assert copied[:, 0, 0, 0].tolist() == [3, 2] and copied.shape == (2, 2, 7, 4)
    joined = gather((3, 1), (2, 4), length=15)
    assert joined[:, 1, ::8, 0].tolist() == [[3, 1], [2, 4]] and joined.shape == (2, 2, 15, 4)


def test_strided_queries() -> None:
    """q as a view of the fused projection."""
    scene = mixed(Shape(4, 2, 16))
    fused = torch.cat([scene.q_THD, scene.q_THD], dim=1)
    view = fused[:, : scene.q_THD.shape[1]]
    assert_close(run(scene._replace(q_THD=view)), eager_attention(scene))


def test_every_code_becomes_its_value() -> None:
    """Attention over equal values returns them: two cached ones, and a cached and a new one."""
    for codes in (torch.int8, torch.float8_e4m3fn):
        bits = torch.arange(256, dtype=torch.uint8)
        table = bits.view(codes).float()
        # No cache stores the least int8 or a NaN.
        usable = table.isfinite() & (table != -128)
        table = table.where(usable, 0)
        stored = table.to(codes).expand(1, 1, 2, 256).contiguous().to(DEVICE)
        scene = make_scene((1,), (2,), Shape(1, 1, 256), block_tokens=2, device=DEVICE)
        one = torch.ones(1, device=DEVICE)
        layer = scene.layer._replace(
            k=torch.zeros_like(stored), v=stored, k_scale_G=one, v_scale_G=one
        )
        batch = replace(
            scene.batch,
            block_table_BM=torch.zeros_like(scene.batch.block_table_BM),
            slots_T=torch.ones(1, dtype=torch.int64, device=DEVICE),
        )
        k, v = torch.zeros(1, 1, 256, device=DEVICE), table.view(1, 1, 256).to(DEVICE)
        angles = torch.zeros(2, 1, 128, device=DEVICE)
        for o_THD in (
            attention.attention(scene.q_THD, layer, batch),
            rope_attention(scene.q_THD, k, v, *angles, layer, batch),
        ):
            assert torch.equal(o_THD.cpu().view(-1), table)
        assert _codes.stored(stored).dtype in (torch.int8, torch.uint8)


def test_kernels_compile_without_spills() -> None:
    """For Hopper and for the GPUs with the least shared memory; all by `triton_compile`."""
    lines = run_compiled(
        "tests.kernels.triton_compile", "tests.kernels.attention_cases", "90", "120", "--first=4"
    ).splitlines()
    assert len(lines) == 6 and all(" 0 bytes spilled" in line for line in lines), lines
