"""The output head as INT8 in the weight stream: by hand, on every number of ranks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.base import Checkpoint
from engine.checkpoint.dummy import open_dummy
from engine.checkpoint.open import open_checkpoint
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.mapping import Mapping
from engine.quant import Algorithm, QuantConfig
from engine.weights.convert import StorePlan, stream_pieces

VOCAB, WIDTH = 97, 64
HEAD = {"head.codes", "head.scale"}
QUANTS = [
    QuantConfig(),
    QuantConfig(Algorithm.W8A16),
    QuantConfig(Algorithm.W4A16),
    QuantConfig(Algorithm.W4A16_AWQ, 128),
    QuantConfig(Algorithm.W4A16_GPTQ, 64),
    QuantConfig(Algorithm.W8A8_SQ, per_token=True, per_channel=True),
    QuantConfig(Algorithm.FP8, per_token=True, per_channel=True),
]
Arrays = dict[str, Tensor]


def load(
    checkpoint: Checkpoint,
    quant: QuantConfig,
    *,
    tp: int = 1,
    pp: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    embedding_dim: int | None = None,
) -> list[Arrays]:
    """The arrays of every rank."""
    plan = StorePlan(checkpoint.config, dtype, quant, embedding_dim, is_dummy=True)
    ranks: list[Arrays] = [{} for _ in range(tp * pp)]
    for piece in stream_pieces(checkpoint, plan, list(Mapping(tp * pp, 0, tp, pp).ranks())):
        array = torch.cat(list(piece.blocks()))
        assert (array.dtype, tuple(array.shape)) == (piece.dtype, piece.shape)
        ranks[piece.rank][piece.name] = array
    return ranks


def with_head(quant: QuantConfig) -> QuantConfig:
    return QuantConfig.from_dict({**quant.to_dict(), "head": "w8a16"})


def assert_is_head(codes_VE: Tensor, scale_V: Tensor, w_VE: Tensor) -> None:
    """One scale per row, its largest magnitude / 127, and codes to the nearest."""
    scale_V1 = w_VE.float().abs().amax(1, keepdim=True) / 127
    assert codes_VE.dtype == torch.int8
    assert torch.equal(scale_V, scale_V1.flatten())
    assert torch.equal(codes_VE.float(), torch.round(w_VE.float() / scale_V1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_rows_are_rounded_one_by_one(tp, dtype, tmp_path, write_hf):
    """From the checkpoint's own values, whatever the engine's dtype; 97 rows divide by no tp."""
    head_VE = write_hf(tmp_path)["lm_head.weight"]
    with open_checkpoint(model_dir=str(tmp_path)) as checkpoint:
        ranks = load(checkpoint, with_head(QuantConfig()), tp=tp, dtype=dtype)
    codes_VE, scale_V = (torch.cat([rank[name] for rank in ranks]) for name in sorted(HEAD))
    assert_is_head(codes_VE[:VOCAB], scale_V[:VOCAB], head_VE)
    assert codes_VE.shape == (VOCAB + -VOCAB % tp, WIDTH)
    assert codes_VE[VOCAB:].count_nonzero() == 0
    assert scale_V.isfinite().all()


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_all_but_the_head_is_as_without(quant):
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=128, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=64,
        intermediate_size=256, max_positions=64,
    )  # fmt: skip
    with open_dummy(config) as checkpoint:
        [without], [found] = load(checkpoint, quant), load(checkpoint, with_head(quant))
    assert found.keys() - without.keys() == HEAD
    assert without.keys() - found.keys() == {"head.weight"}
    assert_is_head(found["head.codes"], found["head.scale"], without["head.weight"])
    for name in found.keys() - HEAD:
        assert torch.equal(found[name].view(torch.uint8), without[name].view(torch.uint8)), name


@pytest.mark.parametrize(
    "vocab, tp, pp, embedding_dim",
    [
        (96, 1, 1, None),
        (96, 2, 1, None),
        (96, 2, 1, 0),
        (96, 2, 1, 1),
        (97, 2, 1, 0),
        (96, 1, 2, 0),
    ],
)
def test_a_tied_table_keeps_its_dtype_and_the_head_is_a_copy(
    vocab, tp, pp, embedding_dim, tmp_path, write_hf
):
    tensors = write_hf(tmp_path, vocab_size=vocab, tie_word_embeddings=True)
    table_VE = tensors["model.embed_tokens.weight"]
    with open_checkpoint(model_dir=str(tmp_path)) as checkpoint:
        ranks = load(
            checkpoint, with_head(QuantConfig()), tp=tp, pp=pp, embedding_dim=embedding_dim
        )
    last = ranks[-tp:]
    codes_VE, scale_V = (torch.cat([rank[name] for rank in last]) for name in sorted(HEAD))
    assert_is_head(codes_VE[:vocab], scale_V[:vocab], table_VE)
    tables = [rank["embed.weight"] for rank in ranks[:tp]]
    whole = tables[0] if embedding_dim is None else torch.cat(tables, dim=embedding_dim)
    assert torch.equal(whole[:vocab], table_VE.bfloat16())


def test_a_damaged_head_is_refused(tmp_path, write_hf):
    tensors = write_hf(tmp_path)
    tensors["lm_head.weight"][-1, -1] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with (
        open_checkpoint(model_dir=str(tmp_path)) as checkpoint,
        pytest.raises(CheckpointError, match="tensor lm_head.weight holds NaN or infinite values"),
    ):
        load(checkpoint, with_head(QuantConfig()))
