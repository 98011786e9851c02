"""The operations that layers call: each runs the best implementation for its tensors' device.

This page is the contract of every implementation; `reference.py` is its plain text. Tensors of
one call share a device, and a dtype of fp32, fp16 or bf16 unless stated. Inputs are not changed.

Dimensions (sizes are local to the rank):
  T tokens in flight   B sequences          M blocks per sequence   S cached positions
  H query heads        G kv heads           D head size             E model width
  F ffn width          N outputs            K inputs                V vocabulary rows
  R groups along K
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from engine.cache import LayerCache
from engine.kernels.registry import select
from engine.kernels.rows import RowState


@dataclass(frozen=True, eq=False)
class Attending:
    """A packed, ragged batch as attention sees it: whose tokens are where, and what they see.

    Sequence b owns the next query_lens[b] tokens of the packed batch, its last ones, and its
    cached positions are 0 … kv_lens[b] - 1, this step's included. A token sees itself and what
    lies before it in its sequence, at most `window` positions in all.

    With `is_bound` the host's `kv_lens` are upper bounds, which a captured graph keeps, and only
    the device knows the lengths; every query_len is then 1, and a length of 0 is a row of padding
    whose output is finite and means nothing.
    """

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    kv_lens_B: Tensor  # int32, the same as kv_lens
    query_starts_B1: Tensor  # int32 [B + 1], prefix sums of query_lens
    block_table_BM: Tensor  # int32; 0 past a sequence's blocks and where a window freed them
    slots_T: Tensor  # int64, block * block_tokens + offset of each new token; negative: padding
    window: int | None
    scale: float
    is_bound: bool = False

    def __post_init__(self) -> None:
        sequences = len(self.query_lens)
        assert len(self.kv_lens) == sequences == len(self.block_table_BM)

    @cached_property
    def true_kv_lens(self) -> list[int]:
        """The lengths on the host, fetched from the device if it has to be."""
        return self.kv_lens_B.tolist() if self.is_bound else list(self.kv_lens)

    @cached_property
    def block_lists(self) -> list[list[int]]:
        """`block_table_BM` on the host, fetched once for all layers of a step."""
        return self.block_table_BM.tolist()


class Places(NamedTuple):
    """Where the newest token of each row goes, for `Attending`."""

    positions_B: Tensor  # int64
    kv_lens_B: Tensor  # int32, positions + 1; 0 in rows of padding
    slots_B: Tensor  # int64; -1 in rows of padding


def linear(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """y [T, N] = x @ wᵀ, accumulated in fp32 at least."""
    return select("linear", x_TK.device)(x_TK, w_NK)


def linear_int8(x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor) -> Tensor:
    """y [T, N] = x @ (codes · scale)ᵀ; codes int8, scale fp32."""
    return select("linear_int8", x_TK.device)(x_TK, codes_NK, scale_N)


def linear_int4(x_TK: Tensor, codes_NB: Tensor, scale_N: Tensor) -> Tensor:
    """y [T, N] = x @ ((codes - 8) · scale)ᵀ; codes 0…15, two a byte in blocks of 64 inputs (uint8
    [N, K/2], see engine.weights.pack.pack_nibbles), scale fp32."""
    return select("linear_int4", x_TK.device)(x_TK, codes_NB, scale_N)


def linear_int4_groups(
    x_TK: Tensor, codes_NB: Tensor, scale_NR: Tensor, zero_NR: Tensor | None, block: int
) -> Tensor:
    """y [T, N] = x @ ((codes - zero) · scale)ᵀ; codes as in `linear_int4` in blocks of `block`
    inputs (32 or 64), scale fp16 or fp32 and zero uint8 0…16 for each of R groups of K/R inputs;
    without `zero` all zeros are 8."""
    return select("linear_int4_groups", x_TK.device)(x_TK, codes_NB, scale_NR, zero_NR, block)


def linear_w8a8(
    x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> Tensor:
    """y [T, N] = (x_codes @ codesᵀ) · x_scale · scale, exact but for the scaling.

    codes int8, scale fp32; x_codes = round(x / x_scale) within ±127, ties to even, where x_scale
    is `input_scale` fp32 [1] or, without one, each token's amax (at least 1e-6) / 127.
    """
    return select("linear_w8a8", x_TK.device)(x_TK, codes_NK, scale_N, input_scale)


def linear_fp8(
    x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> Tensor:
    """y [T, N] = (x_codes @ codesᵀ) · x_scale · scale, accumulated in fp32.

    codes float8_e4m3fn, scale fp32; x_codes are x / x_scale within ±448, rounded to float8_e4m3fn,
    where x_scale is `input_scale` fp32 [1] or, without one, each token's amax (at least 1e-6) /
    448.
    """
    return select("linear_fp8", x_TK.device)(x_TK, codes_NK, scale_N, input_scale)


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """y [T, E] = x / sqrt(mean(x²) + eps), in fp32, rounded to x's dtype, times weight
    (arXiv 1910.07467; the rounding order of transformers' Llama)."""
    return select("rms_norm", x_TE.device)(x_TE, weight_E, eps)


def rope(q_THD: Tensor, k_TGD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, Tensor]:
    """q and k rotated (arXiv 2104.09864): channel i < C = D/2 pairs with channel i + C (neox).

    `cos_TC` and `sin_TC` are fp32 [T, D/2]; computed in fp32 and rounded once.
    """
    return select("rope", q_THD.device)(q_THD, k_TGD, cos_TC, sin_TC)


def silu_mul(gate_up_TF2: Tensor) -> Tensor:
    """y [T, F] = silu(gate) * up; the input [T, 2F] holds gate in its first half."""
    return select("silu_mul", gate_up_TF2.device)(gate_up_TF2)


def embedding(tokens_T: Tensor, table_VE: Tensor, first_row: int = 0) -> Tensor:
    """x [T, E]: rows of a table that holds ids first_row … first_row + V - 1; zeros for others."""
    return select("embedding", table_VE.device)(tokens_T, table_VE, first_row)


def write_kv(k_TGD: Tensor, v_TGD: Tensor, layer: LayerCache, slots_T: Tensor) -> None:
    """Store keys and values in the cache, in place. Slots are distinct; a negative one is skipped
    (padding), but the first is not negative.

    A cache with scales gets x / scale, rounded to whole numbers (ties to even) within ±127, or
    within ±448 to float8_e4m3fn.
    """
    select("write_kv", k_TGD.device)(k_TGD, v_TGD, layer, slots_T)


def rope_write_kv(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    layer: LayerCache,
    slots_T: Tensor,
) -> Tensor:
    """`rope`, of which q is returned, and `write_kv` of the rotated k and of v, in one pass."""
    run = select("rope_write_kv", q_THD.device)
    return run(q_THD, k_TGD, v_TGD, cos_TC, sin_TC, layer, slots_T)


def attention(q_THD: Tensor, layer: LayerCache, batch: Attending) -> Tensor:
    """o [T, H, D] = softmax(scale · q kᵀ) v over the cached positions each token may see.

    Query head h reads kv head h // (H / G). Keys and values come from the cache, where this
    step's are already written; memory outside a sequence's valid positions is never used. Where
    the cache has scales, they are codes · scale, and products are accumulated in fp32.
    """
    return select("attention", q_THD.device)(q_THD, layer, batch)


def rope_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    layer: LayerCache,
    batch: Attending,
) -> Tensor:
    """`rope_write_kv` of this step's keys and values, then `attention` of the rotated q."""
    run = select("rope_attention", q_THD.device)
    return run(q_THD, k_TGD, v_TGD, cos_TC, sin_TC, layer, batch)


def rotary_angles(positions_T: Tensor, inverse_C: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [T, D/2] each, of position · inverse frequency in fp32, times `gain`.

    `positions_T` are int64; `inverse_C` is fp32 [D/2], or [T, D/2] where every token has its own.
    """
    return select("rotary_angles", positions_T.device)(positions_T, inverse_C, gain)


def argmax(logits_BV: Tensor) -> Tensor:
    """tokens int64 [B]: each row's greatest logit, of equal ones the lowest id. NaN is greater
    than any number, as in torch."""
    return select("argmax", logits_BV.device)(logits_BV)


def logsumexp(logits_BV: Tensor) -> Tensor:
    """log Σ exp(logits), fp32 [B], computed in fp32."""
    return select("logsumexp", logits_BV.device)(logits_BV)


def draw(scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Tokens int64 [B] drawn from softmax(scores), fp32: the inverse, at `uniform_B` (float64 in
    [0, 1)), of the distribution function in vocabulary order.

    Weights are fixed-point integers, so their running sum is exact on every device and a token of
    weight 0 is never drawn. Tokens less probable than the best by 2**-(52 - log2 V) get weight 0.
    """
    return select("draw", scores_BV.device)(scores_BV, uniform_B)


def take_tokens(rows: RowState, chosen_B: Tensor) -> None:
    """Append the chosen tokens, int64, to the rows that have not finished, and find those that do
    with them: an end id came, or a stop word, or the row has all the new tokens it may have. In
    place."""
    select("take_tokens", chosen_B.device)(rows, chosen_B)


def place_tokens(ends_B: Tensor, first: int, table_BM: Tensor, block_tokens: int) -> Places:
    """Places of the newest token of rows whose tokens are the columns first … ends - 1 of a
    history. A row of one token, which no prompt came before, is padding."""
    return select("place_tokens", ends_B.device)(ends_B, first, table_BM, block_tokens)
