"""Truth: ModelOpt's own rounding of the state dict beside its export of the same model (`python
make_modelopt.py` in tests/data/quantized), and arithmetic written out by hand.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.checkpoint.awq_file import open_awq_file
from engine.checkpoint.hf import open_hf
from engine.errors import CheckpointError, UserError
from engine.quant import Algorithm, QuantConfig
from tests.unit.engine.checkpoint.quantised_makers import (
    BLOCK,
    DATA,
    LINEARS,
    dequantise,
    golden,
    relative_error,
)

STATE_FILE = DATA / "modelopt-awq-state.pt"
AMAX, FACTOR = ".weight_quantizer._amax", ".input_quantizer._pre_quant_scale"
O_PROJ = BLOCK + "self_attn.o_proj"
ARCHIVE_NAMES = {
    "self_attn.q_proj": "attention:qkv:q",
    "self_attn.k_proj": "attention:qkv:k",
    "self_attn.v_proj": "attention:qkv:v",
    "self_attn.o_proj": "attention:dense",
    "mlp.gate_proj": "mlp:fc",
    "mlp.up_proj": "mlp:gate",
    "mlp.down_proj": "mlp:proj",
}


@pytest.fixture
def base():
    with open_hf(DATA / "base") as checkpoint:
        yield checkpoint


@pytest.fixture
def state() -> dict[str, Tensor]:
    return torch.load(STATE_FILE, weights_only=True)


def save_state(path, state):
    torch.save(state, path)
    return path


def save_archive(path, state: dict[str, Tensor], **extra):
    """The state dict as AMMO's archive: float16 weights, scales of amax / 7."""
    arrays = {
        "_np:vocab_embedding:weight": state["model.embed_tokens.weight"],
        "_np:final_layernorm:weight": state["model.norm.weight"],
        "_np:lm_head:weight": state["lm_head.weight"],
        "_np:layers:0:input_layernorm:weight": state[BLOCK + "input_layernorm.weight"],
        "_np:layers:0:post_layernorm:weight": state[BLOCK + "post_attention_layernorm.weight"],
    }
    for name, archived in ARCHIVE_NAMES.items():
        weight, stem = state[f"{BLOCK}{name}.weight"], f"_np:layers:0:{archived}:"
        scale_NR = state[BLOCK + name + AMAX].reshape(weight.shape[0], -1) / 7
        arrays |= {stem + "weight": weight, stem + "weights_scaling_factor": scale_NR}
        arrays[stem + "prequant_scaling_factor"] = state[BLOCK + name + FACTOR]
    np.savez(path, **{k: v.half().numpy() for k, v in (arrays | extra).items()})
    return path


def test_state_dict_of_modelopt(base, state):
    with open_awq_file(STATE_FILE, base, 128) as checkpoint:
        checkpoint.check()
        assert checkpoint.quant == QuantConfig(Algorithm.W4A16_AWQ, group_size=128)
        for name in LINEARS:
            linear = checkpoint.linear(BLOCK + name)
            truth_NK = dequantise(base.linear(BLOCK + name))
            assert linear.zero_NR is None
            assert relative_error(dequantise(linear), truth_NK) < 0.15
        linear = checkpoint.linear(O_PROJ)
        assert torch.equal(linear.pre_scale_K, state[O_PROJ + FACTOR].float())
        rounded_NK = dequantise(linear) / linear.pre_scale_K
        # All but a few ties, which ModelOpt's product with 7 / amax puts on the other side.
        is_same = torch.isclose(rounded_NK, golden()["modelopt-int4-awq"], rtol=1e-5, atol=1e-7)
        assert (~is_same).sum() < 20


def test_layers_with_one_input_get_one_factor(base):
    """As ModelOpt's export of the same model, which rounds the rescaled weights to bfloat16."""
    with (
        open_awq_file(STATE_FILE, base, 128) as found,
        open_hf(DATA / "modelopt-int4-awq") as export,
    ):
        for name in LINEARS:
            ours, theirs = (c.linear(BLOCK + name) for c in (found, export))
            assert (ours.codes_NK != theirs.codes_NK).float().mean() < 0.01
            torch.testing.assert_close(ours.scale_NR, theirs.scale_NR, rtol=2**-7, atol=0)
            if name == "self_attn.o_proj":
                assert torch.equal(ours.pre_scale_K, theirs.pre_scale_K)
        # Their norm took the factor.
        norm = BLOCK + "input_layernorm.weight"
        folded_K = export.tensors[norm].read().float() / base.tensors[norm].read().float()
        factors = [found.linear(f"{BLOCK}self_attn.{n}_proj").pre_scale_K for n in "qkv"]
        assert torch.equal(factors[0], factors[1]) and torch.equal(factors[1], factors[2])
        torch.testing.assert_close(factors[0], folded_K, rtol=0.01, atol=0)


def test_the_common_factor_by_hand(tmp_path, base, state):
    """Factors 1, 3 and 2 make 2, so q's weights are halved, k's are times 3/2 and v's stay."""
    for name, factor in (("q", 1.0), ("k", 3.0), ("v", 2.0)):
        stem = f"{BLOCK}self_attn.{name}_proj"
        state[stem + FACTOR].fill_(factor)
        state[stem + ".weight"].zero_()
        # Group 0 has 7 and -2, group 1 has 3.5 alone.
        state[stem + ".weight"][0, [0, 1, 128]] = torch.tensor([7, -2, 3.5]).bfloat16()
        state[stem + AMAX].fill_(7)
    with open_awq_file(save_state(tmp_path / "x.pt", state), base, 128) as checkpoint:
        linears = [checkpoint.linear(f"{BLOCK}self_attn.{name}_proj") for name in "qkv"]
    for linear, scale in zip(linears, (0.5, 1.5, 1.0), strict=True):
        assert (linear.pre_scale_K == 2).all()
        # 7 and -2 times the factor, in steps of 7 · factor / 7.
        assert linear.codes_NK[0, :3].tolist() == [8 + 7, 8 - 2, 8]
        assert linear.codes_NK[0, 127:130].tolist() == [8, 8 + 7, 8]
        assert linear.scale_NR[0].tolist() == [scale, scale / 2]
        # Groups of zeros keep the scale they had.
        assert linear.scale_NR[1].tolist() == [1, 1]


def test_weights_beyond_a_clipped_range(tmp_path, base, state):
    """AWQ may lower amax: what lies beyond saturates at -8 and 7, as in ModelOpt's rounding."""
    state[O_PROJ + ".weight"][0, :6] = torch.tensor([9.0, -9, -7.6, 2.5, 3.5, -0.4]).bfloat16()
    state[O_PROJ + AMAX][0] = 7
    with open_awq_file(save_state(tmp_path / "x.pt", state), base, 128) as checkpoint:
        codes = checkpoint.linear(O_PROJ).codes_NK[0, :6]
    # Ties go to the even value.
    assert (codes.int() - 8).tolist() == [7, -8, -8, 2, 4, 0]


def test_without_factors(tmp_path, base, state):
    bare = {name: tensor for name, tensor in state.items() if not name.endswith(FACTOR)}
    with open_awq_file(save_state(tmp_path / "x.pt", bare), base, 128) as checkpoint:
        checkpoint.check()
        assert checkpoint.linear(O_PROJ).pre_scale_K is None
    bare[BLOCK + "mlp.up_proj" + FACTOR] = torch.full((256,), 3.0)
    with open_awq_file(save_state(tmp_path / "x.pt", bare), base, 128) as checkpoint:
        # Gate has a factor of 1, so both get 2.
        for name in ("gate_proj", "up_proj"):
            assert (checkpoint.linear(f"{BLOCK}mlp.{name}").pre_scale_K == 2).all()


@pytest.mark.parametrize("is_folder", [True, False])
def test_archive(tmp_path, base, state, is_folder):
    path = save_archive(tmp_path / "llama_tp1_rank0.npz", state)
    with (
        open_awq_file(tmp_path if is_folder else path, base, 128) as checkpoint,
        open_awq_file(STATE_FILE, base, 128) as expected,
    ):
        checkpoint.check()
        assert checkpoint.quant == expected.quant
        for name in LINEARS:
            found, truth = (c.linear(BLOCK + name) for c in (checkpoint, expected))
            assert relative_error(dequantise(found), dequantise(truth)) < 0.02
        for name, source in expected.tensors.items():
            assert torch.equal(checkpoint.tensors[name].read(), source.read().half()), name


def test_flat_scales_of_an_archive(tmp_path, base, state):
    path = save_archive(tmp_path / "a.npz", state)
    arrays = dict(np.load(path))
    for name in arrays:
        if name.endswith("weights_scaling_factor"):
            arrays[name] = arrays[name].reshape(-1)
    arrays["_np:layers:0:attention:qkv:activation_scaling_factor"] = np.ones(1, np.float32)
    np.savez(tmp_path / "b.npz", **arrays)
    with (
        open_awq_file(path, base, 128) as a,
        open_awq_file(tmp_path / "b.npz", base, 128) as b,
    ):
        b.check()
        assert b.dropped == ("_np:layers:0:attention:qkv:activation_scaling_factor",)
        stem = BLOCK + "mlp.gate_proj"
        assert torch.equal(dequantise(a.linear(stem)), dequantise(b.linear(stem)))


def test_a_smoothed_head_is_made_plain(tmp_path, base, state):
    """The columns were divided by the factor, so weight · factor is the head as it was."""
    factor_K = torch.full((256,), 2.0)
    factor_K[3] = 0.5
    weight_VK = state["lm_head.weight"]
    archive = save_archive(
        tmp_path / "x.npz",
        state,
        **{
            "_np:lm_head:prequant_scaling_factor": factor_K,
            "_np:lm_head:weights_scaling_factor": torch.ones(32, 2),
        },
    )
    quantisers = {"lm_head" + FACTOR: factor_K, "lm_head" + AMAX: torch.ones(64, 1)}
    for path in (archive, save_state(tmp_path / "x.pt", state | quantisers)):
        with open_awq_file(path, base, 128) as checkpoint:
            checkpoint.check()
            head = checkpoint.tensors["lm_head.weight"]
            assert head.dtype == torch.float32
            expected = (weight_VK.half() if path == archive else weight_VK).float() * factor_K
            assert torch.equal(head.read(), expected)
            assert torch.equal(head.rows(3, 5), expected[3:5])


def test_the_base_lends_what_the_file_lacks(tmp_path, base, state):
    linears = {name: tensor for name, tensor in state.items() if "_proj." in name}
    linears[BLOCK + "self_attn.k_bmm_quantizer._amax"] = torch.ones(())
    linears[BLOCK + "mlp.up_proj.input_quantizer._amax"] = torch.ones(())
    with open_awq_file(save_state(tmp_path / "x.pt", linears), base, 128) as checkpoint:
        checkpoint.check()
        assert len(checkpoint.dropped) == 2
        for name in ("lm_head.weight", "model.norm.weight", BLOCK + "input_layernorm.weight"):
            assert torch.equal(checkpoint.tensors[name].read(), base.tensors[name].read())


def test_another_group_size(base):
    message = "--group_size 64 differs from the 128 inputs per group of .*pt; give --group_size 128"
    with pytest.raises(UserError, match=message):
        open_awq_file(STATE_FILE, base, 64)
    with pytest.raises(UserError, match="--group_size 96 does not divide the 128 inputs"):
        open_awq_file(STATE_FILE, base, 96)


def test_what_is_no_such_file(tmp_path, base, state):
    def refused(path, message):
        with pytest.raises(CheckpointError, match=message):
            open_awq_file(path, base, 128)

    refused(tmp_path / "none.npz", "--quant_ckpt_path .*none.npz does not exist")
    refused(tmp_path, "holds 0 .npz files where one for tensor parallelism 1 is read")
    for rank in (0, 1):
        (tmp_path / f"llama_tp2_rank{rank}.npz").write_bytes(b"")
    refused(tmp_path, "holds 2 .npz files where one for tensor parallelism 1 is read, .*one rank")
    (tmp_path / "x.safetensors").write_bytes(b"")
    refused(tmp_path / "x.safetensors", "is no AWQ file .* given as --model_dir alone")
    plain = {name: tensor for name, tensor in state.items() if "quantizer" not in name}
    refused(
        save_state(tmp_path / "plain.pt", plain),
        "has no weight_quantizer._amax for .*q_proj, so it is not an AWQ file for this model",
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop(O_PROJ + AMAX), "o_proj.weight_quantizer._amax is missing"),
        (lambda s: s.update({O_PROJ + ".extra": torch.ones(2)}), "o_proj.extra' has no place"),
        (
            lambda s: s.update({O_PROJ + AMAX: torch.ones(3, 1)}),
            r"_amax' has shape \[3, 1\] but the config needs \[256, 1\] or \[256, 1\] or \[256\]",
        ),
    ],
)
def test_checking_is_total(tmp_path, base, state, change, message):
    change(state)
    with (
        open_awq_file(save_state(tmp_path / "x.pt", state), base, 128) as checkpoint,
        pytest.raises(CheckpointError, match=message),
    ):
        checkpoint.check()


@pytest.mark.parametrize("suffix", [AMAX, FACTOR, ".weight"])
def test_values_that_cannot_be_right(tmp_path, base, state, suffix):
    state[O_PROJ + suffix].view(-1)[3] = float("nan")
    with (
        open_awq_file(save_state(tmp_path / "x.pt", state), base, 128) as checkpoint,
        pytest.raises(CheckpointError, match=f"o_proj{suffix}' holds (nan where|NaN or infinite)"),
    ):
        checkpoint.linear(O_PROJ)
