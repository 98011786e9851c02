"""Stored arrays of the quantised modes: layouts written out by hand, joins, cuts and laziness."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from torch import Tensor

from engine.errors import CheckpointError, UserError
from engine.mapping import Span
from engine.quant import Algorithm, QuantConfig
from engine.weights import deferred
from engine.weights.deferred import Deferred, defer
from engine.weights.pack import PACKS, Packed, nibble_block, pack_nibbles, unpack_nibbles
from engine.weights.quantize import quantize
from engine.weights.types import Dense, Fp8, Int4, Int4Groups, Int8, Lazy, LinearWeights
from tests.unit.engine.weights.test_types import Memory


def arrays(packed: list[Packed]) -> dict[str, Tensor]:
    """The contents, checked against what was announced."""
    found = {}
    for array in packed:
        blocks = list(array.blocks())
        assert all(block.is_contiguous() for block in blocks)
        found[array.suffix] = torch.cat(blocks)
        assert found[array.suffix].dtype == array.dtype, array.suffix
        assert tuple(found[array.suffix].shape) == array.shape, array.suffix
    return found


def codes(outputs: int, inputs: int, low: int, high: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high + 1, (outputs, inputs), generator=generator)


def test_nibbles_by_hand() -> None:
    row = torch.zeros(1, 128, dtype=torch.uint8)
    row[0, 0], row[0, 1], row[0, 31], row[0, 32], row[0, 63] = 1, 2, 3, 4, 5
    row[0, 64], row[0, 96], row[0, 127] = 6, 7, 15
    bytes_by_64 = dict.fromkeys(range(64), 0)
    bytes_by_64 |= {0: 0x41, 1: 0x02, 31: 0x53, 32: 0x76, 63: 0xF0}
    assert pack_nibbles(row, 64).tolist() == [list(bytes_by_64.values())]
    # In blocks of 32, input 32 begins the second block and input 16 would share byte 0.
    row[0, 16] = 9
    bytes_by_32 = dict.fromkeys(range(64), 0)
    bytes_by_32 |= {0: 0x91, 1: 0x02, 15: 0x30, 16: 0x04, 31: 0x50, 32: 0x06, 48: 0x07, 63: 0xF0}
    assert pack_nibbles(row, 32).tolist() == [list(bytes_by_32.values())]


@pytest.mark.parametrize("block", [32, 64])
def test_nibbles_come_back(block: int) -> None:
    original = codes(5, 192, 0, 15).to(torch.uint8)
    packed = pack_nibbles(original, block)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 96)
    assert torch.equal(unpack_nibbles(packed, block), original)


@pytest.mark.parametrize("group_size, block", [(32, 32), (64, 64), (96, 32), (128, 64)])
def test_nibble_blocks_do_not_straddle_groups(group_size: int, block: int) -> None:
    assert nibble_block(group_size) == block
    assert group_size % block == 0


@pytest.mark.parametrize("outputs, inputs", [((5, 3), 33), ((640, 40, 40), 4096)])
def test_int8(outputs: tuple[int, ...], inputs: int) -> None:
    parts = [
        Int8(codes(n, inputs, -127, 127).to(torch.int8), torch.rand(n) + i)
        for i, n in enumerate(outputs)
    ]
    found = arrays(PACKS[Algorithm.W8A16](parts, torch.bfloat16))
    assert list(found) == ["codes", "scale"]
    assert torch.equal(found["codes"], torch.cat([part.codes_NK for part in parts]))
    assert torch.equal(found["scale"], torch.cat([part.scale_N for part in parts]))


def test_int4() -> None:
    parts = [Int4(codes(n, 128, 0, 15).to(torch.uint8), torch.rand(n)) for n in (3, 2)]
    found = arrays(PACKS[Algorithm.W4A16](parts, torch.float16))
    whole = torch.cat([part.codes_NK for part in parts])
    assert torch.equal(unpack_nibbles(found["codes"], 64), whole)
    assert found["scale"].dtype == torch.float32


def grouped(outputs: int, inputs: int, group: int, **optional: Tensor | None) -> Int4Groups:
    scale = torch.rand(outputs, inputs // group) / 64
    return Int4Groups(codes(outputs, inputs, 0, 15).to(torch.uint8), scale, group, **optional)


@pytest.mark.parametrize("algorithm", [Algorithm.W4A16_AWQ, Algorithm.W4A16_GPTQ])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_groups(algorithm: Algorithm, dtype: torch.dtype, group: int) -> None:
    parts = [grouped(n, 256, group) for n in (4, 2)]
    found = arrays(PACKS[algorithm](parts, dtype))
    assert list(found) == ["codes", "scale"]
    whole = torch.cat([part.codes_NK for part in parts])
    assert torch.equal(unpack_nibbles(found["codes"], min(group, 64)), whole)
    scale_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    assert torch.equal(found["scale"], torch.cat([p.scale_NR for p in parts]).to(scale_dtype))


def test_zeros_of_one_part_give_all_parts_zeros() -> None:
    zero = codes(2, 4, 0, 16).to(torch.uint8)
    parts = [grouped(4, 256, 64), grouped(2, 256, 64, zero_NR=zero)]
    found = arrays(PACKS[Algorithm.W4A16_GPTQ](parts, torch.float16))
    assert list(found) == ["codes", "scale", "zero"]
    assert found["zero"].tolist() == [[8] * 4] * 4 + zero.tolist()


def test_the_factor_of_the_input_is_stored_once() -> None:
    factor = torch.rand(128, dtype=torch.float64)
    parts = [grouped(n, 128, 64, pre_scale_K=factor) for n in (4, 2)]
    found = arrays(PACKS[Algorithm.W4A16_AWQ](parts, torch.float16))
    assert torch.equal(found["pre_scale"], factor.float())
    other = dataclasses.replace(parts[1], pre_scale_K=factor + 1)
    packed = PACKS[Algorithm.W4A16_AWQ]([parts[0], other], torch.float16)
    with pytest.raises(AssertionError, match="pre_scale of joined layers differs"):
        list(packed[0].blocks())


def test_scales_beyond_fp16_are_refused() -> None:
    part = dataclasses.replace(grouped(2, 64, 64), scale_NR=torch.tensor([[1.0], [1e5]]))
    with pytest.raises(CheckpointError, match="group scales reach 1e[+]05, more than float16"):
        arrays(PACKS[Algorithm.W4A16_GPTQ]([part], torch.bfloat16))
    arrays(PACKS[Algorithm.W4A16_GPTQ]([part], torch.float32))


def test_smooth() -> None:
    smoother = torch.rand(33) + 0.5
    part = Int8(codes(5, 33, -127, 127).to(torch.int8), torch.rand(5), 0.125, smoother)
    found = arrays(PACKS[Algorithm.W8A8_SQ]([part, part], torch.float16))
    assert list(found) == ["codes", "scale", "input_scale", "smoother"]
    assert found["input_scale"].tolist() == [0.125]
    assert torch.equal(found["smoother"], smoother)
    plain = Int8(part.codes_NK, part.scale_N)
    assert list(arrays(PACKS[Algorithm.W8A8_SQ]([plain], torch.float16))) == ["codes", "scale"]


@pytest.mark.parametrize("input_scale", [None, 0.25])
def test_fp8(input_scale: float | None) -> None:
    part = Fp8(torch.randn(5, 33).to(torch.float8_e4m3fn), torch.rand(5), input_scale)
    found = arrays(PACKS[Algorithm.FP8]([part, part], torch.float16))
    assert torch.equal(found["codes"][:5].float(), part.codes_NK.float())
    assert ("input_scale" in found) == (input_scale is not None)


@pytest.mark.parametrize(
    "part, algorithm, multiple",
    [
        (Int4(torch.zeros(2, 1376, dtype=torch.uint8), torch.ones(2)), Algorithm.W4A16, 64),
        (
            Int4Groups(torch.zeros(2, 48, dtype=torch.uint8), torch.ones(2, 1), 32),
            Algorithm.W4A16_AWQ,
            32,
        ),
    ],
)
def test_inputs_that_cannot_be_packed_are_refused(
    part: LinearWeights, algorithm: Algorithm, multiple: int
) -> None:
    with pytest.raises(UserError) as error:
        PACKS[algorithm]([part], torch.float16)
    assert str(error.value) == (
        f"--tp_size leaves a rank {part.inputs} inputs of a linear layer, which int4 weights need "
        f"to be a multiple of {multiple}; choose a smaller --tp_size, or int8 weights"
    )


SHAPES = [(640, 4096), (896, 7168), (256, 1376)]


@pytest.mark.parametrize("algorithm", [Algorithm.W8A16, Algorithm.FP8])
@pytest.mark.parametrize("outputs, inputs", SHAPES)
def test_rounded_weights_are_read_once_for_all_arrays(
    algorithm: Algorithm, outputs: int, inputs: int
) -> None:
    """Nothing before the first block, and one pass for codes and scales."""
    sources = [Memory(torch.randn(n, inputs)) for n in (outputs, 8)]
    parts = [quantize(Dense(Lazy.whole(source)), QuantConfig(algorithm)) for source in sources]
    packed = PACKS[algorithm](parts, torch.bfloat16)
    assert [source.read_bytes for source in sources] == [[], []]
    arrays(packed)
    assert [sum(s.read_bytes) for s in sources] == [s.tensor.nbytes for s in sources]
    # Written arrays are forgotten: a second time costs a second pass, for the scales alone too.
    first = arrays(packed)
    scale = torch.cat(list(packed[1].blocks()))
    assert torch.equal(scale, first["scale"])
    assert sum(sources[0].read_bytes) == 3 * sources[0].tensor.nbytes


def test_loaded_weights_are_loaded_once_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "BLOCK_BYTES", 256)
    made: list[weakref.ref[Tensor]] = []

    def load() -> Int4Groups:
        weights = grouped(20, 128, 64)
        made.append(weakref.ref(weights.codes_NK))
        return weights

    sketch = Int4Groups(
        torch.empty(20, 128, dtype=torch.uint8, device="meta"),
        torch.empty(20, 2, device="meta"),
        64,
    )
    part = (
        Deferred.by_loading(sketch, load).narrow_outputs(Span(4, 20)).narrow_inputs(Span(64, 128))
    )
    packed = PACKS[Algorithm.W4A16_GPTQ]([part], torch.float16)
    assert packed[0].shape == (16, 32) and packed[1].shape == (16, 1)
    assert made == []
    found = arrays(packed)
    assert len(made) == 1 and made[0]() is None
    assert torch.equal(unpack_nibbles(found["codes"], 64), grouped(20, 128, 64).codes_NK[4:, 64:])


def test_a_cut_through_a_group_is_refused_before_anything_is_loaded() -> None:
    def load() -> LinearWeights:
        raise AssertionError("loaded")

    part = Deferred.by_loading(grouped(4, 128, 64), load)
    with pytest.raises(UserError, match="not a whole number of its 2 groups"):
        part.narrow_inputs(Span(0, 32))


def test_weights_in_memory_and_deferred_pack_alike() -> None:
    part = grouped(6, 128, 64, pre_scale_K=torch.rand(128))
    now, later = (
        arrays(PACKS[Algorithm.W4A16_AWQ]([p], torch.float16)) for p in (part, defer(part))
    )
    assert all(torch.equal(now[name], later[name]) for name in now)
