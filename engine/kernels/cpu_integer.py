"""Exact products of whole numbers with int8 matrices, by a CPU's byte-product instructions.

A sum is the same however many rows are multiplied at once, so a token's result does not depend on
its batch. Knows nothing of scales.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.quantized_reference import row_blocks

# x [M, K] of whole numbers -128…127 in fp32 → x @ codesᵀ, fp32 [M, N].
Product = Callable[[Tensor], Tensor]

UINT8_ZERO = 128
# int8 weights widened to fp32 at a time: 4 MB, a part of the third-level cache.
WIDENED_WEIGHTS = 2**20
# Shape of the trial product; its sums of largest values overflow 16 bits where a CPU would.
TRIAL = (5, 64, 48)


def pack_product(codes_NK: Tensor) -> Product:
    """The product with an int8 matrix, in the layout of the fastest exact implementation."""
    return _fastest()(codes_NK)


def fbgemm_product(codes_NK: Tensor) -> Product:
    """FBGEMM's: up to 8 rows at the speed of memory. PyTorch has announced its removal."""
    ops = torch.ops.quantized
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch._make_per_tensor_quantized_tensor(codes_NK, 1.0, 0)
    packed = ops.linear_prepack(weight, None)
    multiply = ops.linear_with_input_q_dq_qweight_dq_output_fp32
    # Scale 1 and zero point 128 make the operation's rounding of its input the identity.
    return lambda x_MK: multiply(x_MK, 1.0, UINT8_ZERO, packed)


def onednn_product(codes_NK: Tensor) -> Product:
    """oneDNN's: for few rows a third slower than FBGEMM's. Signed inputs would be 250 times
    slower on CPUs without AMX, hence the zero point."""
    ops = torch.ops.onednn
    packed = ops.qlinear_prepack(codes_NK, None)
    one_N = torch.ones(len(codes_NK))
    zero_N = torch.zeros(len(codes_NK), dtype=torch.int32)

    def multiply(x_MK: Tensor) -> Tensor:
        bytes_MK = (x_MK + UINT8_ZERO).to(torch.uint8)
        weight = (packed, one_N, zero_N, None)
        after = (1.0, 0, torch.float32, "none", [], "")
        return ops.qlinear_pointwise(bytes_MK, 1.0, UINT8_ZERO, *weight, *after)

    return multiply


def widened_product(codes_NK: Tensor) -> Product:
    """For any CPU: in fp32, so whole numbers beyond 2^24 are rounded."""

    def multiply(x_MK: Tensor) -> Tensor:
        blocks = row_blocks(codes_NK, codes_NK.shape[1], WIDENED_WEIGHTS)
        return torch.cat([F.linear(x_MK, codes_NK[rows].float()) for rows in blocks], dim=1)

    return multiply


@cache
def _fastest() -> Callable[[Tensor], Product]:
    candidates = (fbgemm_product, onednn_product)
    return next((pack for pack in candidates if is_exact(pack)), widened_product)


def is_exact(pack: Callable[[Tensor], Product]) -> bool:
    """Whether an implementation is there and right on this machine.

    CPUs without VNNI add byte products in 16 bits, which saturate for large values.
    """
    rows, outputs, inputs = TRIAL
    signs_NK = 1 - 2 * (torch.arange(outputs)[:, None] + torch.arange(inputs)) // 7 % 2
    codes_NK = (127 * signs_NK).to(torch.int8)
    x_MK = torch.tensor([127.0, -128.0, 64.0, -1.0, 0.0])[:rows, None].expand(rows, inputs)
    x_MK = torch.cat([x_MK.contiguous(), signs_NK[:3].float() * 127])
    try:
        found_MN = pack(codes_NK)(x_MK)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(found_MN.double(), x_MK.double() @ codes_NK.double().T)
