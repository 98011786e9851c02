"""Attention kernels as they are launched for Yi, for compilation without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.triton import _decode, _prefill
from tests.kernels.triton_compile import CAPABILITIES, Case

CODES = {"plain": None, "int8": "*i8", "fp8": "*u8"}


def decode_case(
    dtype: str,
    codes: str,
    *,
    group: int = 8,
    page: int = 64,
    capabilities: tuple[int, ...] = CAPABILITIES,
    **changes: Any,
) -> Case:
    cache = CODES[codes] or f"*{dtype}"
    scale = CODES[codes] and "*fp32"
    inputs = dict.fromkeys(("out", "q", "k", "v"), f"*{dtype}")
    types: dict[str, str | None] = inputs | {
        "cos": "*fp32", "sin": "*fp32", "k_cache": cache, "v_cache": cache,
        "k_scale": scale, "v_scale": scale, "slots": "*i64", "kv_lens": "*i32", "table": "*i32",
        "partial": "*i32", "tops": "*i32", "score_scale": "fp32", "window": "i32",
        "part_positions": "i32", "most": "i32", "q_stride": "i32", "k_stride": "i32",
        "v_stride": "i32", "block_tokens": "i32", "head_stride": "i32", "block_stride": "i32",
        "table_stride": "i32", "columns": "i32",
    }  # fmt: skip
    is_wide = dtype == "fp32"
    constants = {
        "GROUP": group, "HEADS": 8, "ROWS": 16, "D": 128, "C": 64, "BLOCK_D": 128,
        "BN": 32 if is_wide else 64, "PAGE": page, "IS_TILE": True, "JOINERS": 8, "AT_ONCE": 32,
        "HAS_WINDOW": False, "FLOAT8": True, "HOLD": not is_wide, "KV_HEADS": 4, "PDL": False,
    }  # fmt: skip
    what = "".join(f" {name} {value}" for name, value in changes.items())
    return Case(
        f"decode {dtype} {codes} group {group} page {page}{what}",
        _decode._decode,
        types,
        constants | changes,
        {"num_stages": 1 if is_wide else 3, "enable_fp_fusion": False},
        ("window", "most", "table_stride", "columns"),
        capabilities,
    )


def prefill_case(
    dtype: str,
    codes: str,
    *,
    group: int = 8,
    page: int = 64,
    window: bool = False,
    capabilities: tuple[int, ...] = CAPABILITIES,
    **changes: Any,
) -> Case:
    """`capabilities` have the same tiles."""
    cache = CODES[codes] or f"*{dtype}"
    scale = CODES[codes] and "*fp32"
    types: dict[str, str | None] = {
        "out": f"*{dtype}", "q": f"*{dtype}", "k": cache, "v": cache,
        "k_scale": scale, "v_scale": scale, "query_starts": "*i32", "kv_lens": "*i32",
        "table": "*i32", "score_scale": "fp32", "window": "i32", "whole_from": "i32",
        "q_stride": "i32", "head_stride": "i32", "block_stride": "i32", "table_stride": "i32",
    }  # fmt: skip
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    tiles = _prefill.choose_tiles(kind, capabilities[0] // 10)
    constants = {
        "GROUP": group, "D": 128, "BLOCK_D": 128, "BM": tiles.rows, "BN": tiles.positions,
        "PAGE": page, "HAS_WINDOW": window, "FLOAT8": True, "PDL": False,
    }  # fmt: skip
    name = f"prefill {dtype} {codes} group {group} page {page}" + " window" * window
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return Case(
        name, _prefill._prefill, types, constants | changes, options, ("window",), capabilities
    )


LARGE, SMALL = (90, 100), (80, 86, 89, 120)

CASES = [
    decode_case("bf16", "plain", page=0, group=7),
    decode_case("bf16", "fp8", IS_TILE=False),
    prefill_case("bf16", "plain", capabilities=LARGE),
    prefill_case("bf16", "plain", capabilities=SMALL),
    decode_case("bf16", "plain", IS_TILE=False, JOINERS=0),
    decode_case("bf16", "int8"),
    decode_case("bf16", "int8", IS_TILE=False),
    decode_case("bf16", "plain", page=16, IS_TILE=False, HAS_WINDOW=True),
    decode_case("fp16", "plain"),
    decode_case("fp16", "fp8"),
    decode_case("fp32", "plain"),
    decode_case("fp32", "int8", IS_TILE=False),
    decode_case("bf16", "plain", PDL=True, capabilities=LARGE),
    prefill_case("bf16", "plain", page=0, group=7, capabilities=LARGE),
    prefill_case("bf16", "plain", page=0, group=7, capabilities=SMALL),
    prefill_case("bf16", "int8", capabilities=LARGE),
    prefill_case("bf16", "int8", capabilities=SMALL),
    prefill_case("bf16", "fp8", capabilities=LARGE),
    prefill_case("bf16", "fp8", capabilities=SMALL),
    prefill_case("fp16", "plain", window=True, capabilities=LARGE),
    prefill_case("fp16", "plain", window=True, capabilities=SMALL),
    prefill_case("fp32", "plain"),
    prefill_case("fp32", "fp8", window=True),
]
