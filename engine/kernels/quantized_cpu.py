"""Linear layers with quantised weights, fast on x86 CPUs.

Each operation is a class that lays its weights out for the CPU once, in a thread beside the
loading of others, and is then called with tokens. The rules are measured ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.kernels import cpu, cpu_int4, cpu_int8, packing
from engine.kernels.packing import start
from engine.kernels.quantized_reference import quantize_fp8, row_blocks

# Part of the machine's memory that widened FP8 weights must leave.
RESERVED_MEMORY = 0.25


class Fp8Weights:
    """Products of the codes in bf16, which holds them exactly (fp32 for fp32 tokens).

    CPUs multiply no FP8, and PyTorch's own operation reads 0.2 GB/s. So the weights are widened
    once where the memory allows it, which doubles them, else at each call.
    """

    def __init__(self, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None):
        self._codes_NK, self._scale_N, self._input_scale = codes_NK, scale_N, input_scale
        self._wide_NK = start(_widen_if_room, codes_NK)

    def __call__(self, x_TK: Tensor) -> Tensor:
        x_codes_TK, x_scale = quantize_fp8(x_TK, self._input_scale)
        sums_TN = self._multiply(widen_fp8(x_codes_TK), x_TK.dtype)
        scale = x_scale * self._scale_N * cpu.FP8_FACTOR**-2
        return (sums_TN.float() * scale).to(x_TK.dtype)

    def _multiply(self, x_TK: Tensor, dtype: torch.dtype) -> Tensor:
        wide_NK = self._wide_NK.result()
        if wide_NK is not None and dtype != torch.float32:
            return cpu.linear(x_TK, wide_NK)
        x_TK = x_TK.float() if dtype == torch.float32 else x_TK
        blocks = row_blocks(self._codes_NK, x_TK.shape[1], packing.BLOCK_WEIGHTS)
        parts = [
            cpu.linear(x_TK, widen_fp8(self._codes_NK[rows]).to(x_TK.dtype)) for rows in blocks
        ]
        return torch.cat(parts, dim=1)


def linear_int8(x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor) -> Tensor:
    return cpu_int8.bind_weights(codes_NK, scale_N)(x_TK)


def linear_w8a8(
    x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> Tensor:
    return cpu_int8.bind_activations(codes_NK, scale_N, input_scale)(x_TK)


def linear_int4(x_TK: Tensor, codes_NB: Tensor, scale_N: Tensor) -> Tensor:
    return cpu_int4.bind_rows(codes_NB, scale_N)(x_TK)


def linear_int4_groups(
    x_TK: Tensor, codes_NB: Tensor, scale_NR: Tensor, zero_NR: Tensor | None, block: int
) -> Tensor:
    return cpu_int4.bind_groups(codes_NB, scale_NR, zero_NR, block)(x_TK)


def linear_fp8(
    x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> Tensor:
    return Fp8Weights(codes_NK, scale_N, input_scale)(x_TK)


# What registry.bind makes layers of.
BOUND = {
    "linear_int8": cpu_int8.bind_weights,
    "linear_w8a8": cpu_int8.bind_activations,
    "linear_int4": cpu_int4.bind_rows,
    "linear_int4_groups": cpu_int4.bind_groups,
    "linear_fp8": Fp8Weights,
}


def widen_fp8(codes: Tensor) -> Tensor:
    """float8_e4m3fn → bf16 of cpu.FP8_FACTOR times the value, exactly."""
    # PyTorch's step from fp16 to bf16 is four times slower than that by way of fp32.
    return cpu.fp8_as_fp16(codes).float().bfloat16()


def _widen_if_room(codes_NK: Tensor) -> Tensor | None:
    available, total = _memory_bytes()
    if available - 2 * codes_NK.nbytes < RESERVED_MEMORY * total:
        return None
    wide_NK = torch.empty(codes_NK.shape, dtype=torch.bfloat16)
    for rows in row_blocks(codes_NK, codes_NK.shape[1], packing.BLOCK_WEIGHTS):
        wide_NK[rows] = widen_fp8(codes_NK[rows])
    return wide_NK


def _memory_bytes() -> tuple[int, int]:
    """Available and total; without Linux' file of them, as much as anyone asks for."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62, 1 << 62
    kibibytes = {
        name: int(value.split()[0]) for name, _, value in (s.partition(":") for s in lines)
    }
    return kibibytes["MemAvailable"] << 10, kibibytes["MemTotal"] << 10
