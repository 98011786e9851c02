"""cos and sin of the rotation angles. fp32 angles of long contexts need the exact range reduction
that CUDA's cosf has and its fast approximation lacks: a test reads the compiled code for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._launch import launch_options

BLOCK = 128
WARPS = 4


@triton.jit
def _rotary_angles(
    cos, sin, positions, inverse, count, inverse_stride, gain,
    HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    token, channel = place // HALF, place % HALF
    position = tl.load(positions + token, mask=inside, other=0).to(tl.float32)
    frequency = tl.load(inverse + token * inverse_stride + channel, mask=inside, other=0.0)
    angle = position * frequency
    tl.store(cos + place, tl.cos(angle) * gain, mask=inside)
    tl.store(sin + place, tl.sin(angle) * gain, mask=inside)


def rotary_angles(positions_T: Tensor, inverse_C: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    tokens, half = len(positions_T), inverse_C.shape[-1]
    assert positions_T.is_contiguous() and inverse_C.is_contiguous()
    cos_TC, sin_TC = torch.empty(2, tokens, half, dtype=torch.float32, device=inverse_C.device)
    if tokens:
        _rotary_angles[(triton.cdiv(tokens * half, BLOCK),)](
            cos_TC, sin_TC, positions_T, inverse_C, tokens * half,
            half if inverse_C.ndim == 2 else 0, gain,
            HALF=half, BLOCK=BLOCK, num_warps=WARPS, **launch_options(inverse_C.device),
        )  # fmt: skip
    return cos_TC, sin_TC
