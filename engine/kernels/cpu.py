"""Fast operations for x86 CPUs, chosen by measurement (benchmarks/cpu_linear.py, NOTES.md there).

Only what is slow in `reference`. Knows nothing of quantised weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cache import LayerCache
from engine.kernels import reference
from engine.kernels.api import Attending
from engine.kernels.native import dense, rowwise
from engine.kernels.native.attention import attend_last

# Up to this many tokens the own kernel is faster than PyTorch's.
NATIVE_TOKENS = {torch.bfloat16: 4, torch.float16: 16, torch.float32: 8}

# fp32 elements of a weight converted at a time: 4 MB, a part of the third-level cache.
CONVERTED_ELEMENTS = 2**20

# Elements of a quantised cache widened at a time: as fp32 2 MB, for two cores' second-level caches.
WIDENED_ELEMENTS = 2**19
# What `fp8_as_fp16` multiplies with.
FP8_FACTOR = 2.0**-8

# Up to this many tokens, copies one by one are faster than indexing.
FEW_TOKENS = 4

# Prompt tokens of one attention call, fewer when its mask would exceed this many elements. Few
# tokens skip the keys after them; more amortise the pass over the keys before.
PROMPT_TOKENS = 128
MASK_ELEMENTS = 2**23


def linear(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """The rule that measurement gave, by dtype and by tokens T.

    Few tokens: the own kernel, at the memory's speed. Without it, one bf16 token goes to ATen's
    matrix-vector product, twice as fast as oneDNN's. Many fp16 tokens are multiplied in fp32,
    because the fp16 product for several rows is a scalar loop; the rest is the library's choice.
    """
    if 0 < len(x_TK) <= NATIVE_TOKENS[x_TK.dtype]:
        y_TN = dense.product(x_TK, w_NK)
        if y_TN is not None:
            return y_TN
    if x_TK.dtype == torch.bfloat16 and len(x_TK) == 1:
        return linear_without_onednn(x_TK, w_NK)
    if x_TK.dtype == torch.float16 and len(x_TK) > 1:
        return linear_in_fp32(x_TK, w_NK)
    return F.linear(x_TK, w_NK)


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    y_TE = rowwise.rms_norm(x_TE, weight_E, eps)
    return reference.rms_norm(x_TE, weight_E, eps) if y_TE is None else y_TE


def rope(q_THD: Tensor, k_TGD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, Tensor]:
    q_out_THD = rowwise.rotate(q_THD, cos_TC, sin_TC)
    k_out_TGD = rowwise.rotate(k_TGD, cos_TC, sin_TC)
    if q_out_THD is None or k_out_TGD is None:
        return reference.rope(q_THD, k_TGD, cos_TC, sin_TC)
    return q_out_THD, k_out_TGD


def write_kv(k_TGD: Tensor, v_TGD: Tensor, layer: LayerCache, slots_T: Tensor) -> None:
    if len(slots_T) > FEW_TOKENS:
        reference.write_kv(k_TGD, v_TGD, layer, slots_T)
        return
    k_TGD = reference.stored_form(k_TGD, layer.k, layer.k_scale_G)
    v_TGD = reference.stored_form(v_TGD, layer.v, layer.v_scale_G)
    for token, slot in enumerate(slots_T.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, layer.k.shape[2])
            layer.k[block, :, offset] = k_TGD[token]
            layer.v[block, :, offset] = v_TGD[token]


def rope_write_kv(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    layer: LayerCache,
    slots_T: Tensor,
) -> Tensor:
    if layer.k_scale_G is None:
        cache = (layer.k, layer.v)
        q_out_THD = rowwise.rotate_and_write(q_THD, k_TGD, v_TGD, cos_TC, sin_TC, cache, slots_T)
        if q_out_THD is not None:
            return q_out_THD
    q_THD, k_TGD = rope(q_THD, k_TGD, cos_TC, sin_TC)
    write_kv(k_TGD, v_TGD, layer, slots_T)
    return q_THD


class _Past(NamedTuple):
    """What the tokens of one sequence may see: consecutive cached positions, the last their own."""

    layer: LayerCache
    blocks: list[int]
    positions: range


def attention(q_THD: Tensor, layer: LayerCache, batch: Attending) -> Tensor:
    """Sequence by sequence, so that a result does not depend on what else is in the batch."""
    if all(count == 1 for count in batch.query_lens):
        o_THD = _attend_last(q_THD, layer, batch, batch.block_table_BM, batch.kv_lens_B)
        if o_THD is not None:
            return o_THD
    o_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
    queries, outputs = q_THD.split(batch.query_lens), o_THD.split(batch.query_lens)
    sequences = zip(queries, outputs, batch.true_kv_lens, batch.block_lists, strict=True)
    for b, (q, o, kv_len, blocks) in enumerate(sequences):
        if not len(q) or not kv_len:
            o.zero_()
            continue
        if len(q) == 1:
            tables = (batch.block_table_BM[b : b + 1], batch.kv_lens_B[b : b + 1])
            own_1HD = _attend_last(q, layer, batch, *tables)
            if own_1HD is not None:
                o.copy_(own_1HD)
                continue
        oldest = _oldest_seen(kv_len - len(q), batch.window)
        past = _Past(layer, blocks, range(oldest, kv_len))
        if layer.k_scale_G is None:
            _attend_values(q, o, past, batch)
        elif len(q) > 1:
            _attend_codes(q, o, past, batch)
        else:
            _attend_codes_once(q, o, past, batch)
    return o_THD


def _attend_last(
    q_BHD: Tensor, layer: LayerCache, batch: Attending, block_table_BM: Tensor, kv_lens_B: Tensor
) -> Tensor | None:
    """By the own kernel, one token of each sequence of the tables."""
    if layer.k_scale_G is not None:
        return None
    cache = (layer.k, layer.v)
    tables = (block_table_BM, kv_lens_B)
    return attend_last(q_BHD, *cache, *tables, window=batch.window, scale=batch.scale)


def _attend_values(q_THD: Tensor, o_THD: Tensor, past: _Past, batch: Attending) -> None:
    layer, *where = past
    k_GSD, v_GSD = _read(layer.k, *where), _read(layer.v, *where)
    if q_THD.dtype == torch.float16:
        # fp16 matrix products with several rows are scalar loops; see linear.
        q_THD, k_GSD, v_GSD = q_THD.float(), k_GSD.float(), v_GSD.float()
    _attend(q_THD, o_THD, k_GSD, v_GSD, window=batch.window, scale=batch.scale)


def _attend_codes(q_THD: Tensor, o_THD: Tensor, past: _Past, batch: Attending) -> None:
    """Tokens of a prompt. The scales of keys go to the queries, those of values to the outputs;
    in fp32, which is as fast as bf16 here, that rounds nothing."""
    layer, *where = past
    k_GSD, v_GSD = _read_wide(layer.k, *where), _read_wide(layer.v, *where)
    k_scale_G, v_scale_G = _code_scales(layer)
    q_TGRD = q_THD.float().unflatten(1, (len(k_GSD), -1)) * k_scale_G[:, None, None]
    wide_THD = torch.empty(o_THD.shape)
    _attend(q_TGRD.flatten(1, 2), wide_THD, k_GSD, v_GSD, window=batch.window, scale=batch.scale)
    o_TGRD = wide_THD.unflatten(1, (len(v_GSD), -1)) * v_scale_G[:, None, None]
    o_THD.copy_(o_TGRD.flatten(1, 2))


def _attend_codes_once(q_1HD: Tensor, o_1HD: Tensor, past: _Past, batch: Attending) -> None:
    """One token, in two products in fp32; codes are widened a piece at a time, which the products
    then find in the cache."""
    layer, blocks, seen = past
    groups, head_dim = layer.k.shape[1], layer.k.shape[3]
    size = max(1, WIDENED_ELEMENTS // (groups * head_dim))
    pieces = [seen[start : start + size] for start in range(0, len(seen), size)]
    k_scale_G, v_scale_G = _code_scales(layer)
    q_GRD = q_1HD[0].float().unflatten(0, (groups, -1))
    scores = [q_GRD @ _read_wide(layer.k, blocks, piece).mT for piece in pieces]
    scores_GRS = torch.cat(scores, dim=-1) * (k_scale_G * batch.scale)[:, None, None]
    o_GRD = torch.zeros_like(q_GRD)
    for weights_GRP, piece in zip(scores_GRS.softmax(-1).split(size, -1), pieces, strict=True):
        o_GRD.baddbmm_(weights_GRP, _read_wide(layer.v, blocks, piece))
    o_1HD[0] = (o_GRD * v_scale_G[:, None, None]).flatten(0, 1)


def rope_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    layer: LayerCache,
    batch: Attending,
) -> Tensor:
    q_THD = rope_write_kv(q_THD, k_TGD, v_TGD, cos_TC, sin_TC, layer, batch.slots_T)
    return attention(q_THD, layer, batch)


def _code_scales(layer: LayerCache) -> tuple[Tensor, Tensor]:
    """What widened keys and values are to be multiplied with, [G] each."""
    assert layer.k_scale_G is not None and layer.v_scale_G is not None
    factor = 1.0 if layer.k.dtype == torch.int8 else 1 / FP8_FACTOR
    return layer.k_scale_G * factor, layer.v_scale_G * factor


def fp8_as_fp16(codes: Tensor) -> Tensor:
    """float8_e4m3fn, or its bits → fp16 of 2^-8 times the value: exact, and to fp32 by way of it
    is many times faster than the cast.

    With its exponent and fraction moved to fp16's places, a code is an fp16 value, the smallest
    ones included; only the bias of the exponent differs, by 8. NaN becomes a number.
    """
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    # The sign was extended into the exponent's highest bit.
    return bits.bitwise_and_(~0x4000).view(torch.float16)


def _attend(
    q_THD: Tensor,
    o_THD: Tensor,
    k_GSD: Tensor,
    v_GSD: Tensor,
    *,
    window: int | None,
    scale: float,
) -> None:
    """The tokens of one sequence, which are the last of its S positions."""
    positions, group = k_GSD.shape[1], q_THD.shape[1] // k_GSD.shape[0]
    size = max(1, min(PROMPT_TOKENS, MASK_ELEMENTS // (positions * group)))
    stop = positions - len(q_THD)
    for q, o in zip(q_THD.split(size), o_THD.split(size), strict=True):
        first, stop = stop, stop + len(q)
        oldest = _oldest_seen(first, window)
        mask_RS = _mask(first, stop, oldest, window, group) if len(q) > 1 else None
        o.copy_(_fold(q, k_GSD[:, oldest:stop], v_GSD[:, oldest:stop], mask_RS, scale))


def _fold(
    q_THD: Tensor, k_GSD: Tensor, v_GSD: Tensor, mask_RS: Tensor | None, scale: float
) -> Tensor:
    """Attention with the heads of a group as further query rows: row = token * group + head.

    The group then shares one pass over its keys; with a head per product bf16 is 20 times slower.
    """
    tokens, groups = len(q_THD), len(k_GSD)
    q_GRD = q_THD.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)
    (o_GRD,) = F.scaled_dot_product_attention(
        q_GRD[None], k_GSD[None], v_GSD[None], attn_mask=mask_RS, scale=scale
    )
    return o_GRD.unflatten(1, (tokens, -1)).transpose(0, 1).flatten(1, 2)


def _mask(first: int, stop: int, oldest: int, window: int | None, group: int) -> Tensor:
    """Which of the positions oldest … stop - 1 each folded row of the tokens first … stop - 1
    sees; bool [(stop - first) * group, stop - oldest]."""
    at_T1 = torch.arange(first, stop)[:, None]
    position_S = torch.arange(oldest, stop)
    is_seen_TS = position_S <= at_T1
    if window is not None:
        is_seen_TS &= position_S > at_T1 - window
    return is_seen_TS.repeat_interleave(group, dim=0)


def _oldest_seen(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


def _read(stored: Tensor, blocks: list[int], positions: range) -> Tensor:
    """Consecutive positions of one sequence, [G, S, D]: a view if one block holds them."""
    block_tokens = stored.shape[2]
    parts = []
    for index in range(positions.start // block_tokens, -(-positions.stop // block_tokens)):
        start = index * block_tokens
        part = slice(max(positions.start - start, 0), positions.stop - start)
        parts.append(stored[blocks[index], :, part])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _read_wide(stored: Tensor, blocks: list[int], positions: range) -> Tensor:
    """As `_read`, of codes: fp32, of float8 2^-8 times the value."""
    # PyTorch joins int8 twice as fast as float8.
    codes_GSD = _read(stored.view(torch.int8), blocks, positions)
    return (codes_GSD if stored.dtype == torch.int8 else fp8_as_fp16(codes_GSD)).float()


def linear_without_onednn(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """The flag is process-wide: another thread's product may take the slower path meanwhile."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        return F.linear(x_TK, w_NK)
    finally:
        torch.backends.mkldnn.enabled = before


def linear_in_fp32(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """Rows of the weight are widened (exactly) a few at a time, so that they stay in cache."""
    outputs, inputs = w_NK.shape
    rows = max(1, CONVERTED_ELEMENTS // inputs)
    x_TK = x_TK.float()
    y_TN = torch.empty(len(x_TK), outputs, dtype=w_NK.dtype)
    wide = torch.empty(min(rows, outputs), inputs)
    for y, w in zip(y_TN.split(rows, dim=1), w_NK.split(rows), strict=True):
        y.copy_(F.linear(x_TK, wide[: len(w)].copy_(w)))
    return y_TN
