"""Mapping: the parts of all ranks together are the model, and what cannot be cut is refused."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from engine.config import ModelConfig
from engine.errors import UserError
from engine.mapping import LocalShape, Mapping, Span

YI_6B = ModelConfig()
YI_34B = replace(
    YI_6B,
    hidden_size=7168,
    num_layers=60,
    num_heads=56,
    num_kv_heads=8,
    intermediate_size=20480,
)


def layout(tp: int, pp: int, rank: int = 0) -> Mapping:
    return Mapping(tp * pp, rank, tp, pp)


def test_rank_order_is_tensor_parallel_first():
    places = [(m.rank, m.tp_rank, m.pp_rank) for m in layout(tp=3, pp=2).ranks()]
    assert places == [(0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 0, 1), (4, 1, 1), (5, 2, 1)]


def test_first_and_last_stage():
    stages = [(m.is_first_stage, m.is_last_stage) for m in layout(tp=1, pp=3).ranks()]
    assert stages == [(True, False), (False, False), (False, True)]
    assert layout(1, 1).is_first_stage
    assert layout(1, 1).is_last_stage


@pytest.mark.parametrize(
    "tp, expected",
    [
        (1, LocalShape(heads=32, kv_heads=4, head_dim=128, ffn=11008, vocab=64000)),
        (4, LocalShape(heads=8, kv_heads=1, head_dim=128, ffn=2752, vocab=16000)),
        (8, LocalShape(heads=4, kv_heads=1, head_dim=128, ffn=1376, vocab=8000)),
    ],
)
def test_local_shape_of_yi_6b(tp, expected):
    assert layout(tp, 1).local(YI_6B) == expected


def test_vocabulary_share_is_rounded_up():
    assert layout(4, 1).local(replace(YI_6B, vocab_size=97)).vocab == 25


@pytest.mark.parametrize(
    "tp, kv_heads, expected",
    [
        (2, 4, [(0, 2), (2, 4)]),
        (4, 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (8, 4, [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (3, 4), (3, 4)]),
        (4, 1, [(0, 1)] * 4),
    ],
)
def test_kv_heads_are_repeated_beyond_their_number(tp, kv_heads, expected):
    config = replace(YI_6B, num_kv_heads=kv_heads)
    assert [m.kv_head_span(config) for m in layout(tp, 1).ranks()] == expected


@pytest.mark.parametrize(
    "layers, pp, expected",
    [
        (60, 4, [15, 15, 15, 15]),
        (32, 3, [11, 11, 10]),
        (5, 4, [2, 1, 1, 1]),
        (3, 3, [1, 1, 1]),
    ],
)
def test_uneven_stages_give_the_last_one_the_least(layers, pp, expected):
    config = replace(YI_6B, num_layers=layers)
    assert [m.layer_span(config).size for m in layout(1, pp).ranks()] == expected


def test_layers_pair_slots_with_global_layers():
    config = replace(YI_6B, num_layers=5)
    stages = [list(m.layers(config)) for m in layout(1, 2).ranks()]
    assert stages == [[(0, 0), (1, 1), (2, 2)], [(0, 3), (1, 4)]]


SHAPES = [
    (heads, kv_heads, tp, pp, layers, ffn, vocab)
    for (heads, kv_heads), tp, pp, (layers, ffn, vocab) in itertools.product(
        [(32, 4), (56, 8), (8, 1), (12, 6), (6, 3), (16, 16)],
        [1, 2, 3, 4, 6, 8, 16],
        [1, 2, 3, 5],
        [(5, 48, 97), (32, 11008, 64000), (61, 96, 3)],
    )
    if heads % tp == 0 and ffn % tp == 0 and max(kv_heads, tp) % min(kv_heads, tp) == 0
]


def covered(spans: list[Span], size: int) -> bool:
    """Whether the spans follow each other from 0 and reach `size`."""
    starts = [0, *(span.stop for span in spans)]
    return [span.start for span in spans] == starts[:-1] and starts[-1] >= size


def test_every_shape_is_partitioned_exactly():
    assert len(SHAPES) > 100
    for heads, kv_heads, tp, pp, layers, ffn, vocab in SHAPES:
        config = replace(
            YI_6B,
            num_heads=heads,
            num_kv_heads=kv_heads,
            num_layers=layers,
            intermediate_size=ffn,
            vocab_size=vocab,
        )
        ranks = list(layout(tp, pp).ranks())
        ranks[0].check(config)
        _check_layers(ranks, config, tp)
        for stage in range(pp):
            _check_widths([m for m in ranks if m.pp_rank == stage], config)


def _check_layers(ranks: list[Mapping], config: ModelConfig, tp: int) -> None:
    held = Counter(layer for m in ranks for _, layer in m.layers(config))
    assert held == dict.fromkeys(range(config.num_layers), tp)
    for mapping in ranks:
        slots = [slot for slot, _ in mapping.layers(config)]
        assert slots == list(range(len(slots)))


def _check_widths(stage: list[Mapping], config: ModelConfig) -> None:
    group = config.num_heads // config.num_kv_heads
    assert covered([m.head_span(config) for m in stage], config.num_heads)
    assert covered([m.even_span(config.intermediate_size) for m in stage], config.intermediate_size)
    assert covered([m.even_span(config.vocab_size) for m in stage], config.vocab_size)
    for mapping in stage:
        shape = mapping.local(config)
        heads, kv_heads = mapping.head_span(config), mapping.kv_head_span(config)
        assert (heads.size, kv_heads.size) == (shape.heads, shape.kv_heads)
        assert mapping.even_span(config.intermediate_size).size == shape.ffn
        assert mapping.even_span(config.vocab_size).size == shape.vocab
        # Grouped-query attention: query head h reads KV head h // group, which has to be here.
        assert {head // group for head in range(*heads)} == set(range(*kv_heads))


@pytest.mark.parametrize(
    "tp, pp, embedding_dim",
    [(1, 1, None), (2, 1, 0), (4, 2, 1), (8, 3, None), (32, 32, None)],
)
def test_yi_6b_can_be_cut(tp, pp, embedding_dim):
    layout(tp, pp).check(YI_6B, embedding_dim=embedding_dim)


REFUSED = [
    (YI_6B, 3, 1, None, "^--tp_size 3 does not divide the model's 32 attention heads .* 1, 2, 4"),
    (YI_34B, 16, 1, None, "^--tp_size 16 does not divide the model's 56 attention heads"),
    (
        replace(YI_6B, intermediate_size=11010),
        4,
        1,
        None,
        "^--tp_size 4 does not divide the model's 11010 MLP channels",
    ),
    (
        replace(YI_6B, hidden_size=4098),
        4,
        1,
        1,
        "^--tp_size 4 does not divide the model's 4098 hidden channels",
    ),
    (
        replace(YI_6B, num_heads=12, num_kv_heads=6, intermediate_size=48),
        4,
        1,
        None,
        "^--tp_size 4 neither divides nor is a multiple of the model's 6 KV heads",
    ),
    (YI_6B, 1, 33, None, "^--pp_size 33 exceeds the model's 32 layers"),
]


@pytest.mark.parametrize("config, tp, pp, embedding_dim, message", REFUSED)
def test_refusals(config, tp, pp, embedding_dim, message):
    with pytest.raises(UserError, match=message):
        layout(tp, pp).check(config, embedding_dim=embedding_dim)


def test_hidden_size_matters_only_for_a_table_cut_by_it():
    config = replace(YI_6B, hidden_size=4098)
    layout(4, 1).check(config)
    layout(4, 1).check(config, embedding_dim=0)


@pytest.mark.parametrize(
    "world, tp, pp, message",
    [
        (4, 2, 1, "^--tp_size 2 times --pp_size 1 is 2 but --world_size is 4"),
        (1, 2, 2, "^--tp_size 2 times --pp_size 2 is 4 but --world_size is 1"),
        (0, 1, 1, "^--world_size 0, --tp_size 1 and --pp_size 1 must be at least 1"),
        (1, -1, -1, "^--world_size 1, --tp_size -1 and --pp_size -1 must be at least 1"),
    ],
)
def test_sizes_must_agree(world, tp, pp, message):
    with pytest.raises(UserError, match=message):
        Mapping(world, 0, tp, pp)
