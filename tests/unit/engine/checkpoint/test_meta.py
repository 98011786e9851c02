from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from engine.checkpoint.base import TensorSource
from engine.checkpoint.meta import HalfRotated, JoinedTensor
from engine.checkpoint.open import open_checkpoint
from engine.errors import CheckpointError
from tests.unit.engine.checkpoint.makers import tiny_model, write_json

HEAD_DIM = 8
PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 5000000.0,
    "vocab_size": -1,
}

# Meta's name of each weight of a block, and the dimension its shards split.
BLOCK = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}


def interleave(weight: Tensor) -> Tensor:
    """Rows of each head in Meta's order: row j of a half becomes row 2j, its partner 2j + 1."""
    mixed = torch.empty_like(weight)
    for head in range(0, weight.shape[0], HEAD_DIM):
        for pair in range(HEAD_DIM // 2):
            mixed[head + 2 * pair] = weight[head + pair]
            mixed[head + 2 * pair + 1] = weight[head + pair + HEAD_DIM // 2]
    return mixed


def meta_shards(state: dict[str, Tensor], parts: int, table_dim: int) -> list[dict[str, Tensor]]:
    """What Meta's files hold: own names, interleaved query and key rows, split `parts` ways."""
    whole: dict[str, tuple[Tensor, int | None]] = {
        "tok_embeddings.weight": (state["model.embed_tokens.weight"], table_dim),
        "norm.weight": (state["model.norm.weight"], None),
        "output.weight": (state["lm_head.weight"], 0),
        "rope.freqs": (torch.ones(HEAD_DIM // 2), None),
    }
    for layer in range(PARAMS["n_layers"]):
        for stem, (name, dim) in BLOCK.items():
            weight = state[f"model.layers.{layer}.{stem}.weight"]
            weight = interleave(weight) if stem[-6:] in ("q_proj", "k_proj") else weight
            whole[f"layers.{layer}.{name}.weight"] = (weight, dim)
    return [
        {
            n: w if dim is None else w.chunk(parts, dim)[part].clone()
            for n, (w, dim) in whole.items()
        }
        for part in range(parts)
    ]


def write_meta(folder, shards: list[dict[str, Any]], **params: Any) -> str:
    write_json(folder / "params.json", {**PARAMS, **params})
    for number, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    return str(folder)


@pytest.mark.parametrize("parts, table_dim", [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("vocab_size", [-1, None, 98])
def test_joined_shards_equal_the_transformers_model(tmp_path, state, parts, table_dim, vocab_size):
    path = write_meta(tmp_path, meta_shards(state, parts, table_dim), vocab_size=vocab_size)
    with open_checkpoint(meta_ckpt_dir=path) as checkpoint:
        config = checkpoint.config
        assert (config.vocab_size, config.intermediate_size) == (98, 48)
        assert (config.num_kv_heads, config.head_dim, config.rope.theta) == (2, 8, 5e6)
        assert checkpoint.dropped == ("rope.freqs",)
        assert checkpoint.dtype == torch.float32
        assert checkpoint.tensors.keys() == state.keys()
        for name, tensor in state.items():
            source = checkpoint.tensors[name]
            assert torch.equal(source.read(), tensor), name
            for start, stop in ((0, 1), (3, 13), (15, 16), (7, 7), (14, None)):
                assert torch.equal(source.rows(start, stop), tensor[start:stop]), name
                assert source.rows(start, stop).is_contiguous()


def test_heads_without_groups(tmp_path):
    state = tiny_model(num_key_value_heads=4).state_dict()
    params = {key: value for key, value in PARAMS.items() if key != "n_kv_heads"}
    for number, shard in enumerate(meta_shards(state, 2, 1)):
        torch.save(shard, tmp_path / f"consolidated.{number:02d}.pth")
    write_json(tmp_path / "params.json", params)
    with open_checkpoint(meta_ckpt_dir=str(tmp_path)) as checkpoint:
        assert checkpoint.config.num_kv_heads == 4
        for name, tensor in state.items():
            assert torch.equal(checkpoint.tensors[name].read(), tensor), name


class Listed(TensorSource):
    """A matrix that records which rows were asked for."""

    name, origin, dtype = "layers.0.attention.wq.weight", "consolidated.00.pth", torch.float32

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape = tensor, tuple(tensor.shape)
        self.asked: list[tuple[int, int]] = []

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = self.row_span(start, stop)
        self.asked.append((start, stop))
        return self.tensor[start:stop].clone()


def test_permutation_of_two_heads_written_out():
    source = Listed(torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0], [11.0], [12.0], [13.0]]))
    rotated = HalfRotated(source, head_dim=4)
    assert rotated.read().flatten().tolist() == [0, 2, 1, 3, 10, 12, 11, 13]
    source.asked.clear()
    assert rotated.rows(5, 7).flatten().tolist() == [12, 11]
    assert source.asked == [(4, 8)]


def test_joined_rows_read_only_the_parts_they_touch():
    parts = [Listed(torch.full((4, 2), float(number))) for number in range(3)]
    joined = JoinedTensor(parts, dim=0)
    assert joined.rows(5, 9)[:, 0].tolist() == [1, 1, 1, 2]
    assert [part.asked for part in parts] == [[], [(1, 4)], [(0, 1)]]


def test_attention_scores_are_those_of_metas_rotary(state):
    """Neighbour pairs turned as complex numbers on the file's rows, against transformers."""
    generator = torch.Generator().manual_seed(4)
    x_TE = torch.randn(5, 32, generator=generator)
    w_q, w_k = (torch.randn(HEAD_DIM, 32, generator=generator) for _ in range(2))

    theta = 5e6 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    turn = torch.exp(1j * torch.outer(torch.arange(5.0), theta))
    q_meta, k_meta = (
        torch.view_as_real(torch.view_as_complex((x_TE @ w.T).view(5, -1, 2)) * turn).flatten(1)
        for w in (w_q, w_k)
    )

    rotary = LlamaRotaryEmbedding(tiny_model().config)
    cos, sin = rotary(x_TE, torch.arange(5)[None])
    q_hf, k_hf = (
        (x_TE @ HalfRotated(Listed(w), HEAD_DIM).read().T)[None, None] for w in (w_q, w_k)
    )
    q_hf, k_hf = apply_rotary_pos_emb(q_hf, k_hf, cos, sin)
    torch.testing.assert_close(q_hf[0, 0] @ k_hf[0, 0].T, q_meta @ k_meta.T, rtol=1e-5, atol=1e-4)


def edit(shards: list[dict], name: str, value: Tensor | None, number: int = -1) -> list[dict]:
    shards[number] = {key: tensor for key, tensor in shards[number].items() if key != name}
    if value is not None:
        shards[number][name] = value
    return shards


WQ = "layers.1.attention.wq.weight"
REFUSED = {
    "extra tensor": (
        lambda s: edit(edit(s, "cls.weight", torch.ones(1)), "cls.weight", torch.ones(1), 0),
        "consolidated.00.pth: tensor 'cls.weight' has no place in a Llama network",
    ),
    "bias": (
        lambda s: edit(edit(s, WQ[:-6] + "bias", torch.ones(1)), WQ[:-6] + "bias", s[0][WQ], 0),
        "is a bias",
    ),
    "missing in one": (
        lambda s: edit(s, WQ, None),
        f"consolidated.01.pth: has no tensor '{WQ}' although consolidated.00.pth has",
    ),
    "missing in all": (
        lambda s: edit(edit(s, WQ, None), WQ, None, 0),
        "tensor model.layers.1.self_attn.q_proj.weight is missing",
    ),
    "missing table": (
        lambda s: edit(
            edit(s, "tok_embeddings.weight", None), "tok_embeddings.weight", None, number=0
        ),
        "tensor model.embed_tokens.weight is missing from the consolidated",
    ),
    "other width": (
        lambda s: edit(s, WQ, torch.ones(16, 31)),
        rf"consolidated.01.pth: tensor '{WQ}' with shape \[16, 31\] .* does not continue",
    ),
    "other dtype": (lambda s: edit(s, WQ, s[1][WQ].half()), "torch.float16 does not continue"),
    "vector": (lambda s: edit(s, WQ, torch.ones(32)), r"shape \[32\] .* does not continue"),
    "short": (lambda s: edit(s, WQ, torch.ones(8, 32)), r"has shape \[24, 32\] but the config"),
    "scalar": (
        lambda s: edit(s[:1], "tok_embeddings.weight", torch.tensor(1.0)),
        r"'tok_embeddings.weight' has shape \[\] and is not a matrix",
    ),
    "shard left out": (lambda s: s[:1], "files hold 16 of 32 query rows; download the shards"),
    "layers": (
        lambda s: [{**t, "layers.2.attention.wq.weight": torch.ones(16, 32)} for t in s],
        "belongs to layer 2 but the config says 2 layers",
    ),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_shards_that_do_not_fit(tmp_path, state, change, message):
    path = write_meta(tmp_path, change(meta_shards(state, 2, 1)))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(meta_ckpt_dir=path)
    assert str(tmp_path) in str(caught.value)
    assert "; " in str(caught.value)


def test_files_and_params(tmp_path, state):
    path = write_meta(tmp_path, meta_shards(state, 2, 1), vocab_size=99)
    with pytest.raises(CheckpointError, match=r"shape \[98, 32\] but the config needs \[99, 32\]"):
        open_checkpoint(meta_ckpt_dir=path)
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match="consolidated.00.pth is missing although consol"):
        open_checkpoint(meta_ckpt_dir=path)
    (tmp_path / "params.json").write_text("not json")
    with pytest.raises(CheckpointError, match="params.json: is not valid JSON"):
        open_checkpoint(meta_ckpt_dir=path)
