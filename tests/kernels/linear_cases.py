"""Linear kernels to compile ahead of time for every GPU: each default of the tactics, with all that
it fuses. float8 products are in linear_fp8_cases.py, those of digits in
linear_digits_cases.py."""

from __future__ import annotations

import torch

from engine.kernels.triton._gemv import _gemv
from engine.kernels.triton._gemv_codes import _gemv_codes
from engine.kernels.triton._gemv_words import _gemv_bytes, _gemv_halves, _gemv_nibbles
from engine.kernels.triton._matmul import _tiles, _tiles_nibbles, fit
from engine.kernels.triton._quantize import _quantize
from engine.kernels.triton._tactics import GEMV, candidates
from engine.kernels.triton._tile_end import VARYING
from engine.kernels.triton._weights import Weights
from engine.kernels.triton._widen import _widen_nibbles
from tests.kernels.triton_compile import CAPABILITIES, Case

OUTPUTS, INPUTS = 4096, 4096
# The least of the architectures from Ampere on.
SHARED_BYTES = 99 << 10
ROW = dict.fromkeys(("outputs", "inputs"), "i32")
BYTES = dict.fromkeys(("outputs", "width", "group_size"), "i32")
STRIDES = dict.fromkeys(("x_stride", "y_stride", "residual_stride"), "i32")
WEIGHTS = {"linear": "*bf16", "linear_w8a8": "*i8", "linear_fp8": "*u8"}
WORDS = ("linear", "linear_int8", "linear_int4_groups")
TOKENS = {"linear_w8a8": "*i8", "linear_fp8": "*u8"}


def gemv(op: str, *, is_gated: bool) -> Case:
    """A weight-only product, with norm and residual."""
    config = candidates(op, 1, OUTPUTS, INPUTS)[0]
    kernel = {"linear": _gemv_halves, "linear_int8": _gemv_bytes}.get(op, _gemv_nibbles)
    types = {
        **dict.fromkeys(("y", "x", "norm", "factor", "residual"), "*bf16"), "codes": "*i32",
        "scale": "*fp32" if op == "linear_int8" else "*fp16", "zero": "*u8", "eps": "fp32",
        **BYTES,
    }  # fmt: skip
    constants = {
        "RMS": True, "GATED": is_gated, "HAS_GROUPS": True, "HALF": 32,
        "BN": config.rows // (1 + is_gated),
        "C": 32 * config.warps, "PARTS": INPUTS // (32 * 32 * config.warps), "ASSEMBLY": True,
        "PDL": False,
    }  # fmt: skip
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    return Case(f"gemv {op}", kernel, types, constants, {"num_warps": config.warps})


def gemv_wide() -> Case:
    """fp32 weights."""
    config = candidates("linear", 1, OUTPUTS, INPUTS)[0]
    types = {
        **dict.fromkeys(("y", "x", "codes", "norm", "residual"), "*fp32"), "scale": None,
        "eps": "fp32", **ROW,
    }  # fmt: skip
    constants = {"GATED": False, "BN": 4, "BK": 512, "VEC": 4, "PDL": False}
    return Case("gemv fp32", _gemv, types, constants, {"num_warps": config.warps})


def gemv_codes(op: str, x: str, *, is_gated: bool, converts: bool = False) -> Case:
    """A token of codes, or one that is rounded to float8 after its norm."""
    config = candidates(op, 1, OUTPUTS, INPUTS)[0]
    types = {
        "y": "*bf16", "x": x, "codes": "*i32", "scale": "*fp32", "x_scale": "*fp32",
        "norm": None if x == "*i32" else "*bf16", "residual": "*bf16", "outputs": "i32",
        "width": "i32", "eps": "fp32",
    }  # fmt: skip
    constants = {
        "IS_FLOAT": op == "linear_fp8", "CONVERTS": converts, "GATED": is_gated,
        "BN": config.rows // (1 + is_gated), "C": 32 * config.warps, "ASSEMBLY": True, "PDL": False,
    }  # fmt: skip
    capabilities = tuple(c for c in CAPABILITIES if c >= 89) if converts else CAPABILITIES
    options = {"num_warps": config.warps}
    return Case(f"gemv {op} {x}", _gemv_codes, types, constants, options, (), capabilities)


def tiles(op: str, tokens: int, *, is_gated: bool, float8: bool = True) -> Case:
    config = next(c for c in candidates(op, tokens, OUTPUTS, INPUTS) if c.kind == "tiles")
    dtype = {"*bf16": torch.bfloat16, "*i8": torch.int8, "*u8": torch.uint8}[WEIGHTS[op]]
    weights = Weights(torch.empty(OUTPUTS, INPUTS, dtype=dtype, device="meta"))
    config = fit(config, weights, is_gated, 1 if op in TOKENS else 2, SHARED_BYTES)
    splits = 4 if tokens <= 64 else 1
    has_codes = op in TOKENS
    types = {
        "y": "*bf16", "x": TOKENS.get(op, "*bf16"), "codes": WEIGHTS[op],
        "scale": None if op == "linear" else "*fp32",
        "x_scale": "*fp32" if has_codes else None, "residual": None if is_gated else "*bf16",
        "partial": ("*i32" if op == "linear_w8a8" else "*fp32") if splits > 1 else None,
        "counters": "*i32" if splits > 1 else None, **dict.fromkeys(VARYING, "i32"),
        **ROW, **STRIDES,
    }  # fmt: skip
    constants = {
        "GATED": is_gated, "TOKEN_SCALE": has_codes, "FLOAT8": float8,
        "BN": config.rows, "BT": config.tokens, "BK": config.inputs, 
        "STAGES": config.stages, "PDL": False,
    }  # fmt: skip
    name = f"tiles {op} {tokens}"
    return Case(name, _tiles, types, constants, {"num_warps": config.warps}, tuple(VARYING))


def tiles_nibbles(tokens: int, dtype: str, *, is_gated: bool) -> Case:
    few = candidates("linear_int4_groups", tokens, OUTPUTS, INPUTS)
    codes = torch.empty(OUTPUTS, INPUTS // 2, dtype=torch.uint8, device="meta")
    scale = torch.empty(OUTPUTS, INPUTS // 128, device="meta")
    weights = Weights(codes, scale, block=64)
    config = next(c for c in few if c.kind != GEMV)
    config = fit(config, weights, is_gated, 2, SHARED_BYTES)
    types = {
        "y": dtype, "x": dtype, "codes": "*u8", "scale": "*fp16", "zero": "*u8",
        "residual": None if is_gated else dtype, "partial": "*fp32", "counters": "*i32",
        **dict.fromkeys(VARYING, "i32"), **BYTES, **STRIDES,
    }  # fmt: skip
    constants = {
        "GATED": is_gated, "GROUPS": True, "HALF": 32, "ASSEMBLY": True, "BN": config.rows,
        "BT": config.tokens, "BK": config.inputs, "STAGES": config.stages,
        "PDL": False,
    }  # fmt: skip
    name = f"tiles int4 {tokens} {dtype}"
    return Case(name, _tiles_nibbles, types, constants, {"num_warps": config.warps}, tuple(VARYING))


def quantize(codes: str) -> Case:
    types = {
        "codes": codes, "scales": "*fp32", "x": "*bf16", "norm": "*bf16", "given": None,
        "divisor": "*fp32" if codes == "*i8" else None, "width": "i32", "x_stride": "i32",
        "code_range": "fp32", "eps": "fp32",
    }  # fmt: skip
    constants = {"FLOAT8": True, "BLOCK": 4096, "PDL": False}
    return Case(f"quantize {codes}", _quantize, types, constants, {"num_warps": 8})


def widen_nibbles() -> Case:
    types = {
        "wide": "*bf16", "codes": "*u8", "scale": "*fp16", "zero": "*u8", "inputs": "i32",
        "group_size": "i32",
    }  # fmt: skip
    constants = {"HALF": 32, "BLOCK": 2048, "PDL": False}
    return Case("widen int4", _widen_nibbles, types, constants, {})


CASES = [
    *(gemv(op, is_gated=gated) for op in WORDS for gated in (False, True)),
    gemv_wide(),
    *(gemv_codes("linear_w8a8", "*i32", is_gated=gated) for gated in (False, True)),
    *(
        gemv_codes("linear_fp8", x, is_gated=True, converts=converts)
        for x in ("*i32", "*bf16")
        for converts in (False, True)
    ),
    *(tiles(op, 16, is_gated=False, float8=False) for op in WEIGHTS),
    *(tiles(op, 64, is_gated=True, float8=False) for op in WEIGHTS),
    *(tiles("linear_w8a8", 512, is_gated=gated) for gated in (False, True)),
    *(tiles_nibbles(16, dtype, is_gated=False) for dtype in ("*bf16", "*fp16")),
    tiles_nibbles(64, "*bf16", is_gated=True),
    *(quantize(codes) for codes in ("*i8", "*u8")),
    widen_nibbles(),
]
