"""Bytes and operations, by hand."""

from __future__ import annotations

import pytest

from engine.config import ModelConfig
from engine.mapping import Mapping
from engine.quant import Algorithm, KVStorage, QuantConfig
from utils.benchmarking.traffic import Traffic, decode_flops, prefill_flops, rank_traffic
from utils.benchmarking.workload import Workload

# Width 4, 2 query heads and 1 kv head of 2, MLP 6, vocabulary 10, 3 layers.
SMALL = ModelConfig(
    vocab_size=10,
    hidden_size=4,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    intermediate_size=6,
)
# q 4x4, k and v 2x4 each, o 4x4; gate and up 6x4 each, down 4x6.
LAYER = 16 + 8 + 8 + 16 + 3 * 24
SIZES = {"embed.weight": 80, "head.weight": 80, "norm.weight": 8, "blocks.0.attn.qkv.weight": 64}
ONE = Mapping()


def test_everything_but_the_embedding_is_read():
    traffic = rank_traffic(SIZES, SMALL, ONE, "bfloat16", QuantConfig())
    # K and V of 3 layers, 1 head of 2 values of 2 bytes.
    assert traffic == Traffic(weights=80 + 8 + 64, kv=2 * 3 * 1 * 2 * 2)


def test_an_embedding_that_is_the_head_is_read():
    sizes = {name: size for name, size in SIZES.items() if name != "head.weight"}
    assert rank_traffic(sizes, SMALL, ONE, "bfloat16", QuantConfig()).weights == 80 + 8 + 64


def test_a_quantised_head_is_read_and_the_embedding_not():
    """Also where the two are tied: 10 rows of 4 codes and a scale of 4 bytes."""
    sizes = {name: size for name, size in SIZES.items() if name != "head.weight"}
    sizes |= {"head.codes": 40, "head.scale": 40}
    quant = QuantConfig(head=Algorithm.W8A16)
    assert rank_traffic(sizes, SMALL, ONE, "bfloat16", quant).weights == 40 + 40 + 8 + 64


def test_a_first_stage_reads_no_embedding():
    """It has no head, which is on the last stage."""
    first = Mapping(world=2, rank=0, tp=1, pp=2)
    sizes = {"embed.weight": 80, "blocks.0.attn.qkv.weight": 64}
    traffic = rank_traffic(sizes, SMALL, first, "float32", QuantConfig())
    # 2 of 3 layers, 4 bytes a value.
    assert traffic == Traffic(weights=64, kv=2 * 2 * 1 * 2 * 4)


@pytest.mark.parametrize("kv", [KVStorage.INT8, KVStorage.FP8])
def test_a_quantised_cache_has_a_byte_per_value(kv):
    assert rank_traffic(SIZES, SMALL, ONE, "float32", QuantConfig(kv=kv)).kv == 2 * 3 * 2


def test_replicated_heads_are_read_by_every_rank():
    parts = [
        rank_traffic(SIZES, SMALL, Mapping(2, rank, tp=2), "bfloat16", QuantConfig())
        for rank in range(2)
    ]
    assert parts[0] + parts[1] == Traffic(weights=2 * 152, kv=2 * 24)


def test_a_step_reads_the_weights_once_and_the_cache_of_each_sequence():
    # Steps after the first token read 11, 12 and 13 positions.
    work = Workload(batch=5, input_len=10, output_len=4)
    assert work.mean_context == (11 + 12 + 13) / 3
    traffic = Traffic(weights=1000, kv=7)
    assert traffic.step_bytes(work) == 1000 + 5 * 12 * 7
    assert traffic.token_bytes(work) == 200 + 12 * 7


def test_yi_6b_reads_what_its_shape_says():
    """5.5365 billion weights in the layers, 0.262 in the head, 64 KiB a position."""
    config = ModelConfig()
    weights = 2 * (5_536_481_280 + 262_144_000)
    sizes = {"embed.weight": 2 * 262_144_000, "head.weight": 2 * 262_144_000}
    sizes["blocks"] = weights - sizes["head.weight"]
    traffic = rank_traffic(sizes, config, ONE, "bfloat16", QuantConfig())
    assert traffic == Traffic(weights, 65536)
    assert traffic.token_bytes(Workload(1, 1024, 1)) == pytest.approx(11.66e9, rel=1e-3)


def test_operations_of_a_decode_step():
    work = Workload(batch=2, input_len=10, output_len=4)
    # 12 positions, 2 heads of 2: q · k and p · v are 2 multiplications and additions per value.
    attention = 3 * 12 * 2 * 2 * 2 * 2
    assert decode_flops(SMALL, work) == 2 * (2 * (3 * LAYER + 40) + attention)


def test_operations_of_prompts():
    """Of the head only the last position's, of attention the causal half."""
    work = Workload(batch=2, input_len=3, output_len=4)
    attention = 3 * (1 + 2 + 3) * 2 * 2 * 2 * 2
    assert prefill_flops(SMALL, work) == 2 * (3 * 2 * 3 * LAYER + 2 * 40 + attention)
