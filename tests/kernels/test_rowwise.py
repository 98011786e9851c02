"""Norms, rotation, activation and embedding: operations that treat each token alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from engine.kernels import reference
from engine.kernels.registry import Implementation
from tests.kernels.helpers import DTYPES, assert_close, cases, random

EPS = 1e-5
SIZES = pytest.mark.parametrize("tokens, width", [(1, 64), (7, 4096), (130, 5001)])


def norm_truth(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS) * weight


@cases("rms_norm")
@DTYPES
@SIZES
def test_rms_norm(
    impl: Implementation, device: str, dtype: torch.dtype, tokens: int, width: int
) -> None:
    x = random(tokens, width, dtype=dtype, device=device)
    weight = random(width, dtype=dtype, device=device, seed=1)
    assert_close(impl(x, weight, EPS), norm_truth(x, weight))


@cases("rms_norm")
def test_rms_norm_squares_in_fp32(impl: Implementation, device: str) -> None:
    """300² overflows fp16, and the mean of 4096 ones drifts when added in bf16."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.full((2, 4096), 300.0, dtype=dtype, device=device)
        y = impl(x, torch.ones(4096, dtype=dtype, device=device), EPS)
        assert torch.equal(y.cpu(), torch.ones(2, 4096, dtype=dtype))


@cases("rms_norm")
def test_eps_counts(impl: Implementation, device: str) -> None:
    x = torch.full((1, 64), 1e-3, device=device)
    y = impl(x, torch.ones(64, device=device), 3e-6)
    assert_close(y, torch.full((1, 64), 0.5, dtype=torch.float64))


@DTYPES
@SIZES
def test_reference_norm_has_the_bits_of_transformers(
    dtype: torch.dtype, tokens: int, width: int
) -> None:
    x, weight = random(tokens, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    norm = LlamaRMSNorm(width, EPS)
    norm.weight.data = weight
    assert torch.equal(reference.rms_norm(x, weight, EPS), norm(x).detach())


def rotation(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [T, D/2], of a long context's positions."""
    frequencies = 1 / 5e6 ** (torch.arange(0, head_dim, 2) / head_dim)
    angles = (torch.arange(tokens) * 37)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate_truth(x_THD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Channels i and i + D/2 are the two parts of a complex number, turned by the angle."""
    half = x_THD.shape[-1] // 2
    number = torch.complex(x_THD[..., :half].double(), x_THD[..., half:].double())
    turned = number * torch.complex(cos_TC.double(), sin_TC.double())[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def fused_heads(tokens: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """q [T, 6, 16] and k [T, 2, 16] as views of one projection."""
    qkv = random(tokens, 10, 16, dtype=dtype, device=device)
    return qkv[:, :6], qkv[:, 6:8]


@cases("rope")
@DTYPES
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_rope(impl: Implementation, device: str, dtype: torch.dtype, tokens: int) -> None:
    q, k = fused_heads(tokens, dtype, device)
    cos, sin = rotation(tokens, 16)
    rotated = impl(q, k, cos.to(device), sin.to(device))
    for before, after in zip((q, k), rotated, strict=True):
        assert after.dtype == dtype
        assert_close(after, rotate_truth(before.cpu(), cos, sin))


@DTYPES
def test_reference_rope_against_transformers(dtype: torch.dtype) -> None:
    """The same bits in fp32; elsewhere at least as near to the truth, as cos and sin stay fp32."""
    q, k = fused_heads(130, dtype)
    cos, sin = rotation(130, 16)
    doubled = [torch.cat([part, part], dim=-1).to(dtype)[None] for part in (cos, sin)]
    batched = [x.transpose(0, 1)[None] for x in (q, k)]
    theirs = [x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*batched, *doubled)]
    ours = reference.rope(q, k, cos, sin)
    for before, mine, other in zip((q, k), ours, theirs, strict=True):
        if dtype == torch.float32:
            assert torch.equal(mine, other)
        truth = rotate_truth(before, cos, sin)
        assert (mine - truth).abs().mean() <= (other - truth).abs().mean()


@cases("silu_mul")
@DTYPES
@pytest.mark.parametrize("tokens, width", [(1, 64), (7, 11008), (130, 501)])
def test_silu_mul(
    impl: Implementation, device: str, dtype: torch.dtype, tokens: int, width: int
) -> None:
    gate_up = random(tokens, 2 * width, dtype=dtype, device=device)
    gate, up = gate_up.double().split(width, dim=-1)
    assert_close(impl(gate_up), gate / (1 + torch.exp(-gate)) * up)


@cases("embedding")
@DTYPES
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_embedding_shards_add_up(
    impl: Implementation, device: str, dtype: torch.dtype, id_dtype: torch.dtype
) -> None:
    table = random(97, 33, dtype=dtype, device=device)
    tokens = torch.tensor([0, 48, 49, 96, 96, 1], dtype=id_dtype, device=device)
    assert torch.equal(impl(tokens, table), table[tokens.long()])
    low, high = impl(tokens, table[:49]), impl(tokens, table[49:], 49)
    assert torch.equal(low + high, table[tokens.long()])
    assert not low[2:5].any() and not high[[0, 1, 5]].any()


@cases("embedding")
def test_embedding_of_foreign_rows_is_zero(impl: Implementation, device: str) -> None:
    """Even when the row that stands in for them holds what zero times it is not zero."""
    table = torch.full((4, 8), torch.inf, device=device)
    assert not impl(torch.tensor([3, 99], device=device), table, 10).any()
