"""Products of tokens' digits to compile ahead of time for every GPU: the tactics' defaults."""

from __future__ import annotations

import torch

from engine.kernels.triton._digits import _write_digits
from engine.kernels.triton._matmul_digits import _fit_both, _tiles_bytes, _tiles_nibble_digits
from engine.kernels.triton._tactics import TILES, candidates
from engine.kernels.triton._tile_end import VARYING
from engine.kernels.triton._weights import Weights
from tests.kernels.linear_cases import INPUTS, OUTPUTS, SHARED_BYTES
from tests.kernels.triton_compile import Case

GROUP = 128
ENDS = {"y": "*bf16", "x": "*i8", "step": "*fp32", "partial": "*fp32", "counters": "*i32"}
NUMBERS = dict.fromkeys((*VARYING, "outputs", "y_stride", "residual_stride"), "i32")


def tiles(op: str, tokens: int, *, is_gated: bool, has_zero: bool = False) -> Case:
    config = next(c for c in candidates(op, tokens, OUTPUTS, INPUTS) if c.kind == TILES)
    is_nibbles = op != "linear_int8"
    dtype, width = (torch.uint8, INPUTS // 2) if is_nibbles else (torch.int8, INPUTS)
    weights = Weights(
        torch.empty(OUTPUTS, width, dtype=dtype, device="meta"),
        torch.empty(OUTPUTS, *((INPUTS // GROUP,) if is_nibbles else ()), device="meta"),
        block=64 if is_nibbles else 0,
    )
    config = _fit_both(config, weights, is_gated, SHARED_BYTES)
    constants = {
        "GATED": is_gated, "BN": config.rows, "BT": config.tokens, "BK": config.inputs,
        "STAGES": config.stages, "PDL": False,
    }  # fmt: skip
    residual = None if is_gated else "*bf16"
    if not is_nibbles:
        types = {**ENDS, **NUMBERS, "codes": "*i8", "scale": "*fp32", "inputs": "i32"}
        kernel = _tiles_bytes
    else:
        types = {
            **ENDS, **NUMBERS, "codes": "*u8", "scale": "*fp16", "width": "i32",
            "group_size": "i32", "zero": "*u8" if has_zero else None,
        }  # fmt: skip
        constants |= {"GROUPS": True, "ASSEMBLY": True}
        kernel = _tiles_nibble_digits
    name = f"{op} {tokens}{' gated' * is_gated}{' zero' * has_zero}"
    options = {"num_warps": config.warps}
    return Case(name, kernel, types | {"residual": residual}, constants, options, tuple(VARYING))


def write(half: int) -> Case:
    types = {
        "digits": "*i8", "steps": "*fp32", "x": "*bf16", "factor": "*bf16", "width": "i32",
        "x_stride": "i32", "plane": "i32", "eps": "fp32",
    }  # fmt: skip
    constants = {"RMS": True, "HALF": half, "BLOCK": 4096, "PDL": False}
    return Case(f"digits {half}", _write_digits, types, constants, {"num_warps": 8})


CASES = [
    *(tiles("linear_int8", tokens, is_gated=tokens == 64) for tokens in (16, 64)),
    *(tiles("linear_int4_groups", tokens, is_gated=tokens == 64) for tokens in (16, 64)),
    tiles("linear_int4_groups", 64, is_gated=True, has_zero=True),
    write(0),
    write(32),
]
