"""RotaryEmbedding against transformers' LlamaRotaryEmbedding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.config import ModelConfig
from engine.layers.rope import RotaryEmbedding

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000000.0,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear, a broken factor": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA_3,
    "llama3, other bounds": LLAMA_3 | {"low_freq_factor": 0.5, "high_freq_factor": 9.0},
    "yarn": YARN,
    "yarn, factor 1": YARN | {"factor": 1.0},
    "yarn, mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn, half of mscale": YARN | {"mscale": 0.707},
    "yarn, attention_factor": YARN | {"attention_factor": 1.25},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, other betas": YARN | {"beta_fast": 20.0, "beta_slow": 3.0},
    "yarn, one ramp dimension": YARN | {"beta_fast": 2.0, "beta_slow": 2.0, "truncate": False},
}
THETAS = (10000.0, 500000.0, 5000000.0)
# fp32 rounds an angle of 8000 radians to 2⁻¹⁰ or so before cos sees it; both sides compute the
# same angle, so only the last bits of cos and sin may differ.
TOLERANCE = 1e-6
POSITIONS = torch.cat([torch.arange(0, 8000, 13), torch.tensor([7999])])


def rotations(changes: dict[str, Any]) -> tuple[RotaryEmbedding, LlamaRotaryEmbedding]:
    config = BASE | changes
    ours = RotaryEmbedding(ModelConfig.from_hf(config, "config.json"), torch.device("cpu"))
    return ours, LlamaRotaryEmbedding(LlamaConfig(**copy.deepcopy(config)))


def expected(theirs: LlamaRotaryEmbedding, positions_T: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """cos and sin [T, D/2] of one sequence; transformers repeats them for both halves."""
    cos, sin = theirs(torch.zeros(1), positions_T[None])
    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:])
    return cos[0, :, :half], sin[0, :, :half]


def check(ours: RotaryEmbedding, theirs: LlamaRotaryEmbedding, positions_T: torch.Tensor) -> None:
    lengths_T = torch.full_like(positions_T, int(positions_T.max()) + 1)
    for actual, wanted in zip(
        ours(positions_T, lengths_T), expected(theirs, positions_T), strict=True
    ):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("name", SCALINGS)
def test_angles_equal_transformers(name, theta):
    ours, theirs = rotations({"rope_scaling": SCALINGS[name], "rope_theta": theta})
    check(ours, theirs, POSITIONS)


@pytest.mark.parametrize("head_dim", [2, 4, 64, 96])
@pytest.mark.parametrize("name", ["default", "linear", "llama3", "yarn"])
def test_other_head_sizes(name, head_dim):
    ours, theirs = rotations({"rope_scaling": SCALINGS[name], "head_dim": head_dim})
    check(ours, theirs, POSITIONS)


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 3000, 8000])
def test_dynamic_scaling_depends_on_the_length(length):
    ours, theirs = rotations({"rope_scaling": SCALINGS["dynamic"]})
    check(ours, theirs, torch.arange(length))


def test_dynamic_scaling_of_a_mixed_batch_follows_each_sequence():
    """Tokens of a short and of a long sequence in one step, one decoding, one in its prompt."""
    ours, _ = rotations({"rope_scaling": SCALINGS["dynamic"]})
    lengths = (300, 2500)
    positions = [torch.arange(300), torch.tensor([2499])]
    wanted = []
    for length, rows in zip(lengths, positions, strict=True):
        _, theirs = rotations({"rope_scaling": SCALINGS["dynamic"]})
        wanted.append([part[rows] for part in expected(theirs, torch.arange(length))])

    lengths_T = torch.cat([torch.full_like(p, n) for n, p in zip(lengths, positions, strict=True)])
    cos, sin = ours(torch.cat(positions), lengths_T)

    for actual, parts in ((cos, [w[0] for w in wanted]), (sin, [w[1] for w in wanted])):
        torch.testing.assert_close(actual, torch.cat(parts), rtol=0, atol=TOLERANCE)


def test_any_integers_serve_as_lengths():
    ours, _ = rotations({"rope_scaling": SCALINGS["dynamic"]})
    positions_T, lengths_T = torch.tensor([5, 2499]), torch.tensor([300, 2500])
    for long, short in zip(
        ours(positions_T, lengths_T), ours(positions_T, lengths_T.int()), strict=True
    ):
        assert torch.equal(long, short)


def test_lengths_are_ignored_without_dynamic_scaling():
    ours, theirs = rotations({})
    positions_T = torch.tensor([0, 5, 4000])
    cos, _ = ours(positions_T, torch.tensor([1, 99999, 7]))
    torch.testing.assert_close(cos, expected(theirs, positions_T)[0], rtol=0, atol=TOLERANCE)
