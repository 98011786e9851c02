"""Yi's real heads – 32 with 4, and 56 with 8, of 128 – in every mode, cut 1, 2, 4 and 8 ways: each
rank's arrays are slices of the whole ones, written out here."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from engine.checkpoint.dummy import open_dummy
from engine.config import ModelConfig
from engine.errors import UserError
from engine.mapping import Mapping
from engine.quant import Algorithm, KVStorage, QuantConfig
from engine.weights.convert import StorePlan, stream_pieces

HEAD, WIDTH = 128, 256
HEADS = {"Yi-6B": (32, 4), "Yi-34B": (56, 8)}
# Divides by 8 ranks, groups of 128 and blocks of 64.
FFN = 8 * 128
MODES = {
    "none": QuantConfig(),
    "int8": QuantConfig(Algorithm.W8A16),
    "int4": QuantConfig(Algorithm.W4A16),
    "awq": QuantConfig(Algorithm.W4A16_AWQ, 128),
    "gptq g64": QuantConfig(Algorithm.W4A16_GPTQ, 64),
    "sq per tensor": QuantConfig(Algorithm.W8A8_SQ),
    "sq per token, per channel": QuantConfig(Algorithm.W8A8_SQ, per_token=True, per_channel=True),
    "fp8": QuantConfig(Algorithm.FP8, per_token=True, per_channel=True),
    "int8, int8 kv": QuantConfig(Algorithm.W8A16, kv=KVStorage.INT8),
    "awq, fp8 kv": QuantConfig(Algorithm.W4A16_AWQ, 128, kv=KVStorage.FP8),
}
Arrays = dict[str, Tensor]


def make_config(model: str, ffn: int = FFN) -> ModelConfig:
    heads, kv_heads = HEADS[model]
    return ModelConfig(
        vocab_size=64, hidden_size=WIDTH, num_layers=1, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=HEAD, intermediate_size=ffn, max_positions=64,
    )  # fmt: skip


@cache
def load(model: str, mode: str, tp: int) -> list[Arrays]:
    """The arrays of every rank."""
    config, quant = make_config(model), MODES[mode]
    checkpoint = open_dummy(config)
    scales = torch.arange(1.0, config.num_kv_heads + 1)
    checkpoint.give_kv_scales([(scales, 2 * scales)], quant.kv)
    plan = StorePlan(config, torch.bfloat16, quant, is_dummy=True)
    ranks: list[Arrays] = [{} for _ in range(tp)]
    for piece in stream_pieces(checkpoint, plan, list(Mapping(tp, 0, tp, 1).ranks())):
        ranks[piece.rank][piece.name] = torch.cat(list(piece.blocks()))
    return ranks


def rows(array: Tensor, parts: list[tuple[int, int]]) -> Tensor:
    return torch.cat([array[start : start + size] for start, size in parts])


def same(found: Tensor, expected: Tensor) -> bool:
    """float8 has no comparison of its own."""
    return torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", HEADS)
def test_ranks_hold_slices(model, mode, tp):
    heads, kv_heads = HEADS[model]
    [whole] = load(model, mode, 1)
    q_rows, kv_rows, ffn = heads * HEAD, kv_heads * HEAD, FFN // tp
    for rank, arrays in enumerate(load(model, mode, tp)):
        assert arrays.keys() == whole.keys()
        q = (rank * q_rows // tp, q_rows // tp)
        # With more ranks than KV heads, neighbours hold the same one.
        share = max(kv_heads // tp, 1)
        first = rank * kv_heads // tp
        k, v = ((q_rows + n * kv_rows + first * HEAD, share * HEAD) for n in (0, 1))
        gate_up = [(rank * ffn, ffn), (FFN + rank * ffn, ffn)]
        for name, array in arrays.items():
            if not name.startswith("blocks.0.attn.") and not name.startswith("blocks.0.mlp."):
                continue
            expected = whole[name]
            layer, _, suffix = name.split(".", 3)[3].partition(".")
            if layer == "kv_scale":
                expected = expected[:, first : first + share]
            elif suffix == "input_scale":
                pass
            elif layer == "qkv":
                expected = rows(expected, [q, k, v])
            elif layer == "gate_up":
                expected = rows(expected, gate_up)
            elif suffix == "scale" and expected.ndim == 1:
                pass
            else:
                size = expected.shape[1] // tp
                expected = expected[:, rank * size : (rank + 1) * size]
            assert same(array, expected), name


@pytest.mark.parametrize("tp", [1, 2])
def test_groups_of_yi_6b_are_cut_two_ways(tp):
    """11008 inputs are 86 groups of 128: two ranks take 43 each."""
    assert plan_down(tp) == 11008 // tp // 2


def test_groups_are_not_cut_through():
    with pytest.raises(UserError, match="86 groups of 128; choose a --tp_size that divides 86"):
        plan_down(4)


def plan_down(tp: int) -> int:
    """Bytes of a row of down_proj, by the headers alone."""
    config = make_config("Yi-6B", ffn=11008)
    plan = StorePlan(config, torch.bfloat16, MODES["awq"], is_dummy=True)
    pieces = stream_pieces(open_dummy(config), plan, list(Mapping(tp, 0, tp, 1).ranks()))
    return next(p.shape[1] for p in pieces if p.name == "blocks.0.mlp.down.codes")
