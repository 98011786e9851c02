"""Kernels of a decode step outside the layers, as they are launched for Yi-6B, for compilation."""

from __future__ import annotations

from engine.kernels.rows import RowState, StopRules
from engine.kernels.triton import (
    _vocabulary,
    argmax,
    draw,
    logsumexp,
    place_tokens,
    rotary_angles,
    take_tokens,
)
from tests.kernels.rowwise_cases import case
from tests.kernels.triton_compile import compile_case

ROWS = dict.fromkeys(["rows", "history_stride", "num_end_ids", "num_words", "longest"], "i32")
LONGS = dict.fromkeys([*RowState._fields[:-1], *StopRules._fields, "chosen"], "*i64")
NO_WORDS = {"words_BNL": None, "word_lengths_BN": None}
PLACES = {"positions": "*i64", "kv_lens": "*i32", "slots": "*i64", "ends": "*i64", "table": "*i32"}
NUMBERS = {"rows": "i32", "first": "i32", "block_tokens": "i32", "table_stride": "i32"}
LOGITS = {"vocab": "i32", "row_stride": "i32", "part_tiles": "i32"}
FOUND = {"tokens": "*i64", "found": "*i64", "arrivals": "*i32"}
TILE, WARPS = _vocabulary.TILE, {"num_warps": _vocabulary.WARPS}

CASES = [
    case(
        rotary_angles._rotary_angles, "",
        {"count": "i32", "inverse_stride": "i32", "gain": "fp32"},
        {"HALF": 64, "BLOCK": rotary_angles.BLOCK}, {"num_warps": rotary_angles.WARPS},
        {"cos": "*fp32", "sin": "*fp32", "positions": "*i64", "inverse": "*fp32"}, True,
    ),
    case(argmax._argmax, "logits", LOGITS, {"TILE": TILE, "PARTS": 64}, WARPS, FOUND, True),
    case(
        argmax._argmax, "", LOGITS, {"TILE": TILE, "PARTS": 1}, WARPS, FOUND | {"logits": "*fp32"}
    ),
    case(
        draw._draw, "", LOGITS | {"largest": "fp32"}, {"TILE": TILE, "PARTS": 64}, WARPS,
        FOUND | {"scores": "*fp32", "best_ids": "*i64", "uniform": "*fp64"}, True,
    ),
    case(
        logsumexp._logsumexp, "logits", LOGITS, {"TILE": TILE, "PARTS": 16}, WARPS,
        {"result": "*fp32", "found": "*fp32", "arrivals": "*i32"}, True,
    ),
    case(
        take_tokens._take_tokens, "", ROWS,
        {"BLOCK": take_tokens.BLOCK, "END_IDS": 1, "WORDS": 1}, {"num_warps": take_tokens.WARPS},
        LONGS | NO_WORDS, True,
    ),
    case(
        take_tokens._take_tokens, "", ROWS,
        {"BLOCK": take_tokens.BLOCK, "END_IDS": 16, "WORDS": 16},
        {"num_warps": take_tokens.WARPS}, LONGS,
    ),
    case(
        place_tokens._place_tokens, "", NUMBERS, {"BLOCK": place_tokens.BLOCK},
        {"num_warps": place_tokens.WARPS}, PLACES, True,
    ),
]  # fmt: skip


if __name__ == "__main__":
    print(compile_case(CASES[0], 90).ptx)
