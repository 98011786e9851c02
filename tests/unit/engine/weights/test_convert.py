"""The weight stream against cuts made by hand on the whole tensors."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from engine.checkpoint.base import Checkpoint
from engine.checkpoint.dummy import open_dummy
from engine.checkpoint.open import open_checkpoint
from engine.config import ModelConfig
from engine.mapping import Mapping
from engine.quant import QuantConfig
from engine.weights.convert import Piece, StorePlan, stream_pieces
from engine.weights.types import Lazy

KV_HEADS, HEAD_DIM, WIDTH = 2, 8, 64

Weights = dict[str, Tensor]


class Source(NamedTuple):
    folder: Path
    tensors: Weights


@pytest.fixture(scope="module")
def source(tmp_path_factory, write_hf) -> Source:
    folder = tmp_path_factory.mktemp("checkpoint")
    return Source(folder, write_hf(folder))


def pieces_of(
    checkpoint: Checkpoint,
    tp: int = 1,
    pp: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    embedding_dim: int | None = None,
) -> list[Piece]:
    plan = StorePlan(checkpoint.config, dtype, QuantConfig(), embedding_dim)
    return list(stream_pieces(checkpoint, plan, list(Mapping(tp * pp, 0, tp, pp).ranks())))


def load(folder: Path, tp: int = 1, pp: int = 1, **options) -> dict[int, Weights]:
    """Rank → its tensors; every piece has the dtype and shape that it announced."""
    ranks: dict[int, Weights] = {rank: {} for rank in range(tp * pp)}
    with open_checkpoint(model_dir=str(folder)) as checkpoint:
        for piece in pieces_of(checkpoint, tp, pp, **options):
            tensor = torch.cat(list(piece.blocks()))
            assert (tensor.dtype, tuple(tensor.shape)) == (piece.dtype, piece.shape)
            assert tensor.nbytes == piece.nbytes
            assert piece.name not in ranks[piece.rank]
            ranks[piece.rank][piece.name] = tensor
    return ranks


def assert_same(actual: Weights, expected: Weights) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def padded(table_VE: Tensor, tp: int) -> Tensor:
    missing = -table_VE.shape[0] % tp
    return torch.cat([table_VE, table_VE.new_zeros(missing, table_VE.shape[1])])


def kv_part(weight_NE: Tensor, tp: int, tp_rank: int) -> Tensor:
    """Whole heads, each as many times as it takes to reach tp of them."""
    heads_GDE = weight_NE.view(KV_HEADS, HEAD_DIM, WIDTH)
    if tp > KV_HEADS:
        heads_GDE = heads_GDE.repeat_interleave(tp // KV_HEADS, dim=0)
    return heads_GDE.chunk(tp)[tp_rank].reshape(-1, WIDTH)


def layer_by_hand(tensors: Weights, layer: int, slot: int, tp: int, tp_rank: int) -> Weights:
    def whole(stem: str) -> Tensor:
        return tensors[f"model.layers.{layer}.{stem}.weight"]

    def rows(stem: str) -> Tensor:
        return whole(stem).chunk(tp)[tp_rank]

    def cols(stem: str) -> Tensor:
        return whole(stem).chunk(tp, dim=1)[tp_rank]

    kv = [kv_part(whole(f"self_attn.{name}_proj"), tp, tp_rank) for name in "kv"]
    block = {
        "attn_norm": whole("input_layernorm"),
        "attn.qkv": torch.cat([rows("self_attn.q_proj"), *kv]),
        "attn.out": cols("self_attn.o_proj"),
        "mlp_norm": whole("post_attention_layernorm"),
        "mlp.gate_up": torch.cat([rows("mlp.gate_proj"), rows("mlp.up_proj")]),
        "mlp.down": cols("mlp.down_proj"),
    }
    return {f"blocks.{slot}.{name}.weight": tensor for name, tensor in block.items()}


def rank_by_hand(
    tensors: Weights, tp: int, pp: int, rank: int, embedding_dim: int | None
) -> Weights:
    stage, tp_rank = divmod(rank, tp)
    layers = torch.arange(3).tensor_split(pp)[stage].tolist()
    expected: Weights = {}
    for slot, layer in enumerate(layers):
        expected |= layer_by_hand(tensors, layer, slot, tp, tp_rank)
    if stage == 0:
        table = tensors["model.embed_tokens.weight"]
        cuts = {
            None: table,
            0: padded(table, tp).chunk(tp)[tp_rank],
            1: table.chunk(tp, dim=1)[tp_rank],
        }
        expected["embed.weight"] = cuts[embedding_dim]
    if stage == pp - 1:
        expected["norm.weight"] = tensors["model.norm.weight"]
        expected["head.weight"] = padded(tensors["lm_head.weight"], tp).chunk(tp)[tp_rank]
    return expected


@pytest.mark.parametrize("embedding_dim", [None, 0, 1])
@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_rank_gets_its_part(source, tp, pp, embedding_dim):
    """tp 4 and 8 exceed the 2 KV heads; 97 tokens do not divide by any tp."""
    ranks = load(source.folder, tp, pp, embedding_dim=embedding_dim)
    for rank, actual in ranks.items():
        assert_same(actual, rank_by_hand(source.tensors, tp, pp, rank, embedding_dim))


def test_vocabulary_padding_is_zero(source):
    last = load(source.folder, tp=4, embedding_dim=0)[3]
    assert last["embed.weight"].shape == (25, WIDTH)
    assert torch.count_nonzero(last["embed.weight"][-3:]) == 0
    assert torch.count_nonzero(last["head.weight"][-3:]) == 0
    assert torch.count_nonzero(last["head.weight"][-4]) > 0


def test_more_ranks_than_tokens(tmp_path, write_hf):
    tensors = write_hf(tmp_path, vocab_size=5)
    ranks = load(tmp_path, tp=4, embedding_dim=0)
    table = torch.cat([ranks[rank]["embed.weight"] for rank in range(4)])
    assert torch.equal(table, padded(tensors["model.embed_tokens.weight"], 4))
    assert ranks[3]["head.weight"].shape == (2, WIDTH)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("engine", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_cast(tmp_path, write_hf, stored, engine):
    tensors = write_hf(tmp_path, dtype=stored)
    [actual] = load(tmp_path, dtype=engine).values()
    expected = rank_by_hand({k: t.to(engine) for k, t in tensors.items()}, 1, 1, 0, None)
    assert_same(actual, expected)


TIED = [
    # vocabulary, tp, pp, embedding_dim, whether the head is stored
    (96, 1, 1, None, False),
    (96, 1, 1, 0, False),
    (96, 2, 1, None, False),
    (96, 2, 1, 0, False),
    (96, 2, 1, 1, True),
    (96, 1, 2, None, True),
    (97, 1, 1, None, False),
    (97, 2, 1, 0, True),
]


@pytest.mark.parametrize("vocab, tp, pp, embedding_dim, stored", TIED)
def test_tied_head_is_stored_only_where_it_is_no_part_of_the_table(
    tmp_path, write_hf, vocab, tp, pp, embedding_dim, stored
):
    tensors = write_hf(tmp_path, vocab_size=vocab, tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for rank, actual in load(tmp_path, tp, pp, embedding_dim=embedding_dim).items():
        expected = rank_by_hand(tensors, tp, pp, rank, embedding_dim)
        if not stored:
            del expected["head.weight"]
        assert_same(actual, expected)


def test_file_order_and_alternation_of_ranks(source):
    with open_checkpoint(model_dir=str(source.folder)) as checkpoint:
        pieces = [(piece.rank, piece.name) for piece in pieces_of(checkpoint, tp=2, pp=2)]
    rows = ["attn_norm", "attn.qkv", "attn.out", "mlp_norm", "mlp.gate_up", "mlp.down"]
    blocks = [(0, 0), (0, 1), (1, 0)]
    expected = [(rank, "embed.weight") for rank in (0, 1)]
    for stage, slot in blocks:
        ranks = (2 * stage, 2 * stage + 1)
        expected += [(rank, f"blocks.{slot}.{row}.weight") for row in rows for rank in ranks]
    expected += [(rank, name) for name in ("norm.weight", "head.weight") for rank in (2, 3)]
    assert pieces == expected


def test_nothing_is_read_before_blocks_are_taken(source, monkeypatch):
    reads = []
    blocks = Lazy.blocks
    monkeypatch.setattr(Lazy, "blocks", lambda self: (reads.append(self.source.name), blocks(self)))
    with open_checkpoint(model_dir=str(source.folder)) as checkpoint:
        pieces = pieces_of(checkpoint, tp=4, pp=3)
    assert len(pieces) == 4 * (1 + 3 * 6 + 2)
    assert reads == []


@pytest.mark.parametrize("embedding_dim", [None, 0, 1])
def test_dummy_model_is_the_same_however_it_is_cut(embedding_dim):
    """Put together again, the ranks of any layout are the model of one rank."""
    config = ModelConfig(
        vocab_size=600, hidden_size=64, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=8,
        intermediate_size=640,
    )  # fmt: skip
    dummy = open_dummy(config)
    whole = {name: tensor.read() for name, tensor in dummy.tensors.items()}
    for tp, pp in ((1, 1), (2, 1), (4, 2)):
        for piece in pieces_of(dummy, tp, pp, embedding_dim=embedding_dim):
            if piece.name == "head.weight":
                wanted = whole["lm_head.weight"].chunk(tp)[piece.rank % tp]
            elif piece.name == "blocks.0.mlp.gate_up.weight":
                layer = piece.rank // tp
                parts = [whole[f"model.layers.{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up")]
                wanted = torch.cat([part.chunk(tp)[piece.rank % tp] for part in parts])
            elif piece.name == "blocks.0.mlp.down.weight":
                down = whole[f"model.layers.{piece.rank // tp}.mlp.down_proj.weight"]
                wanted = down.chunk(tp, dim=1)[piece.rank % tp]
            else:
                continue
            assert torch.equal(torch.cat(list(piece.blocks())), wanted.float()), piece.name
