"""Rotary embedding angles (arXiv 2104.09864) with the scalings of long-context checkpoints.

Half-rotation (neox) order; the rotation itself is a kernel. All arithmetic is fp32, as in
transformers, whose results are the reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.config import ModelConfig, Rope
from engine.kernels import api as ops


class RotaryEmbedding:
    """cos and sin of every token's rotation angles."""

    def __init__(self, config: ModelConfig, device: torch.device):
        self._rope = config.rope
        self._head_dim = config.head_dim
        self._max_positions = config.max_positions
        self._inverse, self._gain = _inverse_frequencies(config.rope, config.head_dim)
        self._inverse = self._inverse.to(device)

    def __call__(self, positions_T: Tensor, lengths_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each fp32 [T, D/2].

        `lengths_T` is the length of each token's sequence; only dynamic scaling depends on it.
        """
        inverse = self._inverse
        if self._rope.type == "dynamic":
            inverse = self._dynamic_inverse(lengths_T)
        return ops.rotary_angles(positions_T, inverse, self._gain)

    def _dynamic_inverse(self, lengths_T: Tensor) -> Tensor:
        """Dynamic NTK scaling: the base grows with the sequence, [T, D/2]."""
        factor, dim = self._rope.factor, self._head_dim
        stretch = factor * lengths_T.clamp(min=self._max_positions) / self._max_positions
        # fp32 powers of long and of short tensors differ in the last bit; rounded fp64 ones do not.
        growth = ((stretch - (factor - 1)).double() ** (dim / (dim - 2))).float()
        base = self._rope.theta * growth
        return 1.0 / base[:, None] ** _exponents(dim).to(base.device)


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def _inverse_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies fp32 [D/2] and the factor applied to cos and sin."""
    inverse = 1.0 / rope.theta ** _exponents(head_dim)
    if rope.type == "linear":
        return inverse / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(inverse, rope), 1.0
    if rope.type == "yarn":
        return _yarn(rope, head_dim), _yarn_gain(rope)
    return inverse, 1.0


def _llama3(inverse: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, the middle interpolated."""
    assert rope.original_max_positions is not None
    wavelength = 2 * math.pi / inverse
    turns = rope.original_max_positions / wavelength
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * inverse / rope.factor + blend * inverse


def _yarn(rope: Rope, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071): interpolated below `low`, extrapolated above `high`."""
    assert rope.original_max_positions is not None
    positions, theta = rope.original_max_positions, rope.theta

    def dimension_of(rotations: float) -> float:
        turns = positions / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    # In transformers' order of operations: a long position multiplies every difference.
    period, kept = theta ** _exponents(head_dim), 1 - ramp
    return 1.0 / (rope.factor * period) * (1 - kept) + 1.0 / period * kept


def _yarn_gain(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
