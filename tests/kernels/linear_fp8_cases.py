"""Products of float8, for GPUs that have them (sm_89 and later), and what follows cuBLAS'."""

from __future__ import annotations

from engine.kernels.triton import _quantize, _scale
from tests.kernels.linear_cases import tiles
from tests.kernels.triton_compile import Case


def scale_sums(*, is_gated: bool) -> Case:
    types = {
        "y": "*bf16", "sums": "*bf16", "scale": "*fp32", "x_scale": "*fp32",
        "residual": None if is_gated else "*bf16", "outputs": "i32", "tokens": "i32",
        "sums_stride": "i32", "residual_stride": "i32", "unit": "fp32",
    }  # fmt: skip
    constants = {
        "TOKEN_SCALE": True, "GATED": is_gated, "BN": _scale.ROWS, "BT": _scale.TOKENS,
        "PDL": False,
    }  # fmt: skip
    options = {"num_warps": _scale.WARPS}
    return Case("scale sums", _scale._scale_sums, types, constants, options, ("tokens",))


def quantize_gated(*, is_given: bool) -> Case:
    types = {
        "codes": "*u8", "scales": "*fp32", "sums": "*bf16", "scale": "*fp32", "x_scale": "*fp32",
        "given": "*fp32" if is_given else None, "width": "i32", "code_range": "fp32",
        "unit": "fp32",
    }  # fmt: skip
    constants = {
        "TOKEN_SCALE": True, "FLOAT8": True, "ASSEMBLY": True, "PARTS": 3,
        "BLOCK": _quantize.GATED_BLOCK, "PDL": False,
    }  # fmt: skip
    options = {"num_warps": _quantize.GATED_BLOCK // _quantize.GATED_LOAD}
    return Case("quantize gated", _quantize._quantize_gated, types, constants, options)


CASES = [
    *(scale_sums(is_gated=gated) for gated in (False, True)),
    *(quantize_gated(is_given=given) for given in (False, True)),
    *(tiles("linear_fp8", tokens, is_gated=False) for tokens in (16, 64, 512)),
    *(tiles("linear_fp8", tokens, is_gated=True) for tokens in (16, 64, 512)),
]
