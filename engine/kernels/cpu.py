"""Fast operations for x86 CPUs, chosen by measurement (benchmarks/cpu_linear.py, NOTES.md there).

Only what is slow in `reference`: its norms and other row-wise operations are at the memory's
speed already. Knows nothing of quantised weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cache import LayerCache
from engine.kernels import reference
from engine.kernels.api import Attending

# fp32 elements of a weight converted at a time: 4 MB, a part of the third-level cache.
CONVERTED_ELEMENTS = 2**20

# Up to this many tokens, copies one by one are faster than indexing.
FEW_TOKENS = 4

# Prompt tokens of one attention call, fewer when its mask would exceed this many elements. Few
# tokens skip the keys after them; more amortise the pass over the keys before.
PROMPT_TOKENS = 128
MASK_ELEMENTS = 2**23


def linear(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """The rule that measurement gave, by dtype and by tokens T.

    bf16: T = 1 ATen's matrix-vector product, twice as fast as oneDNN's; else oneDNN.
    fp16: T = 1 ATen's; else fp32, because the fp16 product for several rows is a scalar loop.
    fp32: the library's choice.
    """
    if x_TK.dtype == torch.bfloat16 and len(x_TK) == 1:
        return linear_without_onednn(x_TK, w_NK)
    if x_TK.dtype == torch.float16 and len(x_TK) > 1:
        return linear_in_fp32(x_TK, w_NK)
    return F.linear(x_TK, w_NK)


def write_kv(k_TGD: Tensor, v_TGD: Tensor, layer: LayerCache, slots_T: Tensor) -> None:
    if len(slots_T) > FEW_TOKENS:
        reference.write_kv(k_TGD, v_TGD, layer, slots_T)
        return
    for token, slot in enumerate(slots_T.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, layer.k.shape[2])
            layer.k[block, :, offset] = k_TGD[token]
            layer.v[block, :, offset] = v_TGD[token]


def attention(q_THD: Tensor, layer: LayerCache, batch: Attending) -> Tensor:
    """Sequence by sequence, so that a result does not depend on what else is in the batch."""
    o_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
    queries, outputs = q_THD.split(batch.query_lens), o_THD.split(batch.query_lens)
    sequences = zip(queries, outputs, batch.true_kv_lens, batch.block_lists, strict=True)
    for q, o, kv_len, blocks in sequences:
        if not len(q) or not kv_len:
            o.zero_()
            continue
        oldest = _oldest_seen(kv_len - len(q), batch.window)
        k_GSD = _read(layer.k, blocks, oldest, kv_len)
        v_GSD = _read(layer.v, blocks, oldest, kv_len)
        if q.dtype == torch.float16:
            # fp16 matrix products with several rows are scalar loops; see linear.
            q, k_GSD, v_GSD = q.float(), k_GSD.float(), v_GSD.float()
        _attend(q, o, k_GSD, v_GSD, window=batch.window, scale=batch.scale)
    return o_THD


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


def _read(stored: Tensor, blocks: list[int], first: int, stop: int) -> Tensor:
    """Positions first … stop - 1 of one sequence, [G, S, D]: a view if one block holds them."""
    block_tokens = stored.shape[2]
    parts = []
    for index in range(first // block_tokens, -(-stop // block_tokens)):
        start = index * block_tokens
        parts.append(stored[blocks[index], :, max(first - start, 0) : stop - start])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


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
