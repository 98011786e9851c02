"""Row-wise kernels as they are launched for Yi-6B, for compilation without a GPU."""

from __future__ import annotations

from typing import Any

from engine.kernels.triton import (
    embedding,
    rms_norm,
    rope,
    rope_write_kv,
    silu_mul,
    write_kv,
)
from engine.kernels.triton._heads import ROUNDS_EACH
from engine.kernels.triton._norm import row_block
from tests.kernels.triton_compile import CAPABILITIES, Case

LARGE = (90, 100)
BLOCK, WARPS = row_block(4096)
HEAD = {"HALF": 64, "C": 64}
CACHE = {"block_tokens": "i32", "block_stride": "i32", "head_stride": "i32"}


def case(
    kernel: Any,
    pointers: str,
    numbers: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    special: dict[str, str | None] | None = None,
    pdl: bool = False,
) -> Case:
    """`pointers` are bf16 but for those in `special`."""
    types: dict[str, str | None] = dict.fromkeys(pointers.split(), "*bf16")
    types |= numbers | (special or {})
    capabilities = LARGE if pdl else CAPABILITIES
    name = kernel.fn.__name__.strip("_") + " pdl" * pdl
    return Case(name, kernel, types, {**constants, "PDL": pdl}, options, (), capabilities)


def cache_case(kernel: Any, codes: str, *, pdl: bool = False) -> Case:
    """A kernel that writes the cache: `codes` is its type."""
    scale = None if codes == "*bf16" else "*fp32"
    special = {"k_cache": codes, "v_cache": codes, "k_scale": scale, "v_scale": scale}
    special |= {"slots": "*i64"}
    strides = {"k_stride": "i32", "v_stride": "i32", **CACHE}
    if kernel is write_kv._write_kv:
        constants = {"D": 128, "BLOCK_D": 128}
        return case(kernel, "k v", strides, constants, {"num_warps": 2}, special, pdl)
    special |= {"cos": "*fp32", "sin": "*fp32"}
    constants = {"GROUP": 8, "HEADS": 8, "D": 128, "C": 64}
    strides |= {"q_stride": "i32"}
    return case(kernel, "out q k v", strides, constants, ROUNDS_EACH, special, pdl)


def norm_case(pdl: bool) -> Case:
    numbers = {"width": "i32", "x_stride": "i32", "eps": "fp32"}
    constants, options = {"BLOCK": BLOCK}, {"num_warps": WARPS}
    return case(rms_norm._rms_norm, "y x weight", numbers, constants, options, None, pdl)


CASES = [
    cache_case(rope_write_kv._rope_write_kv, "*bf16", pdl=True),
    cache_case(rope_write_kv._rope_write_kv, "*u8"),
    norm_case(True),
    norm_case(False),
    cache_case(rope_write_kv._rope_write_kv, "*i8"),
    cache_case(write_kv._write_kv, "*bf16"),
    cache_case(write_kv._write_kv, "*u8"),
    case(
        silu_mul._silu_mul, "y gate_up", {"width": "i32", "row_stride": "i32"},
        {"BLOCK": silu_mul.BLOCK}, {"num_warps": silu_mul.WARPS}, None, True,
    ),
    case(
        embedding._embedding, "x table",
        {"first_row": "i32", "rows": "i32", "width": "i32", "table_stride": "i32"},
        {"BLOCK": embedding.BLOCK}, {"num_warps": embedding.WARPS}, {"tokens": "*i64"}, True,
    ),
    case(
        rope._rope, "out x", {"heads": "i32", "x_stride": "i32"}, {"HEADS": 8, **HEAD},
        ROUNDS_EACH, {"cos": "*fp32", "sin": "*fp32"}, True,
    ),
]  # fmt: skip
