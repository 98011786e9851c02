"""Every operation in plain PyTorch, for any device: the truth that fast kernels are tested by.

The contracts are in `api.py`. Written to be read; speed is the business of the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cache import LayerCache
from engine.kernels.api import Attending, Places
from engine.kernels.quantized_reference import quantize_fp8, quantize_int8
from engine.kernels.rows import FinishReason, RowState, append, find_reasons, tail

# Attention takes this many tokens at a time, so that a long prompt's scores fit in memory.
MAX_QUERIES = 256
# Integers up to 2**53 are exact in float64, in which a uniform number meets the total weight.
EXACT_BITS = 52


def linear(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    return F.linear(x_TK, w_NK)


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    wide_TE = x_TE.float()
    scale_T1 = torch.rsqrt(wide_TE.pow(2).mean(-1, keepdim=True) + eps)
    return (wide_TE * scale_T1).to(x_TE.dtype) * weight_E


def rope(q_THD: Tensor, k_TGD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(q_THD, cos_TC, sin_TC), _rotate(k_TGD, cos_TC, sin_TC)


def _rotate(x_THD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    assert cos_TC.shape[-1] * 2 == x_THD.shape[-1], "one angle per pair of channels"
    cos_T1C, sin_T1C = cos_TC[:, None], sin_TC[:, None]
    low, high = x_THD.float().chunk(2, dim=-1)
    rotated = (low * cos_T1C - high * sin_T1C, high * cos_T1C + low * sin_T1C)
    return torch.cat(rotated, dim=-1).to(x_THD.dtype)


def silu_mul(gate_up_TF2: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def embedding(tokens_T: Tensor, table_VE: Tensor, first_row: int = 0) -> Tensor:
    rows_T = tokens_T - first_row
    is_outside_T = (rows_T < 0) | (rows_T >= table_VE.shape[0])
    x_TE = F.embedding(rows_T.masked_fill(is_outside_T, 0), table_VE)
    return x_TE.masked_fill_(is_outside_T[:, None], 0)


def write_kv(k_TGD: Tensor, v_TGD: Tensor, layer: LayerCache, slots_T: Tensor) -> None:
    # Padding repeats the first token's write: the same value twice, and no wait for the device.
    is_padding_T = slots_T < 0
    source_T = torch.arange(len(slots_T), device=slots_T.device).masked_fill_(is_padding_T, 0)
    slots_T = slots_T[source_T]
    block_tokens = layer.k.shape[2]
    blocks_T, offsets_T = slots_T // block_tokens, slots_T % block_tokens
    layer.k[blocks_T, :, offsets_T] = stored_form(k_TGD, layer.k, layer.k_scale_G)[source_T]
    layer.v[blocks_T, :, offsets_T] = stored_form(v_TGD, layer.v, layer.v_scale_G)[source_T]


def stored_form(x_TGD: Tensor, stored: Tensor, scale_G: Tensor | None) -> Tensor:
    """Keys or values as the cache `stored` keeps them: unchanged, or codes where it has scales."""
    if scale_G is None:
        return x_TGD
    quantize = quantize_int8 if stored.dtype == torch.int8 else quantize_fp8
    codes_TGD, _ = quantize(x_TGD, scale_G[:, None])
    return codes_TGD.to(stored.dtype)


def attention(q_THD: Tensor, layer: LayerCache, batch: Attending) -> Tensor:
    parts = []
    queries = q_THD.split(batch.query_lens)
    for q, kv_len, blocks in zip(queries, batch.true_kv_lens, batch.block_lists, strict=True):
        if not kv_len:
            parts.append(torch.zeros_like(q))
            continue
        first = kv_len - len(q)
        for part in q.split(MAX_QUERIES):
            parts.append(_attend(part, first, layer, blocks, batch))
            first += len(part)
    return torch.cat(parts)


def _attend(
    q_THD: Tensor, first: int, layer: LayerCache, blocks: list[int], batch: Attending
) -> Tensor:
    """Attention of consecutive tokens of one sequence, the first at position `first`."""
    stop, oldest = first + len(q_THD), 0
    if batch.window is not None:
        oldest = max(0, first - batch.window + 1)
    seen_S = torch.arange(oldest, stop, device=q_THD.device)
    k_SGD = _read(layer.k, layer.k_scale_G, blocks, seen_S)
    v_SGD = _read(layer.v, layer.v_scale_G, blocks, seen_S)
    at_T1 = torch.arange(first, stop, device=q_THD.device)[:, None]
    is_hidden_TS = seen_S > at_T1
    if batch.window is not None:
        is_hidden_TS |= seen_S <= at_T1 - batch.window
    # Query head h = g * (H / G) + r reads kv head g.
    q_TGRD = q_THD.float().unflatten(1, (k_SGD.shape[1], -1))
    scores_GRTS = torch.einsum("tgrd,sgd->grts", q_TGRD, k_SGD) * batch.scale
    weights_GRTS = scores_GRTS.masked_fill(is_hidden_TS, float("-inf")).softmax(-1)
    o_TGRD = torch.einsum("grts,sgd->tgrd", weights_GRTS, v_SGD)
    return o_TGRD.flatten(1, 2).to(q_THD.dtype)


def _read(stored: Tensor, scale_G: Tensor | None, blocks: list[int], positions_S: Tensor) -> Tensor:
    """One sequence's keys or values at `positions_S`, fp32 [S, G, D]."""
    block_tokens = stored.shape[2]
    blocks_M = torch.tensor(blocks, device=positions_S.device)
    at = (blocks_M[positions_S // block_tokens], slice(None), positions_S % block_tokens)
    x_SGD = stored[at].float()
    return x_SGD if scale_G is None else x_SGD * scale_G[:, None]


def rope_write_kv(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    layer: LayerCache,
    slots_T: Tensor,
) -> Tensor:
    q_THD, k_TGD = rope(q_THD, k_TGD, cos_TC, sin_TC)
    write_kv(k_TGD, v_TGD, layer, slots_T)
    return q_THD


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


def rotary_angles(positions_T: Tensor, inverse_C: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    angles_TC = positions_T[:, None].float() * inverse_C
    return angles_TC.cos() * gain, angles_TC.sin() * gain


def argmax(logits_BV: Tensor) -> Tensor:
    # On a CPU torch takes four times as long for 16-bit numbers.
    return logits_BV.float().argmax(-1)


def logsumexp(logits_BV: Tensor) -> Tensor:
    return logits_BV.float().logsumexp(-1)


def draw(scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
    vocab_size = scores_BV.shape[1]
    best_B1 = scores_BV.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores_BV.dtype).min)
    weights_BV = (scores_BV - best_B1).exp_().mul_(largest_weight(vocab_size)).to(torch.int64)
    sums_BV = weights_BV.cumsum(-1)
    target_B1 = (uniform_B[:, None] * sums_BV[:, -1:]).to(torch.int64)
    tokens_B1 = torch.searchsorted(sums_BV, target_B1, right=True)
    # Only a row with every token banned runs past the end.
    return tokens_B1.clamp_(max=vocab_size - 1).squeeze(1)


def largest_weight(vocab_size: int) -> float:
    """What the best token weighs in `draw`: V of them are exact in float64."""
    return 2.0 ** (EXACT_BITS - (vocab_size - 1).bit_length())


def take_tokens(rows: RowState, chosen_B: Tensor) -> None:
    alive_B = rows.reasons_B == FinishReason.NOT_FINISHED.value
    append(rows.history_BH, rows.ends_B, chosen_B, alive_B)
    tails_B1L = tail(rows.history_BH, rows.ends_B, rows.rules.tail_length)[:, None]
    num_new_B = rows.ends_B - rows.starts_B
    reasons_B1 = find_reasons(chosen_B[:, None], tails_B1L, num_new_B, rows.rules)
    rows.reasons_B.copy_(torch.where(alive_B, reasons_B1.squeeze(1), rows.reasons_B))
    rows.tokens_B.copy_(torch.where(alive_B, chosen_B, rows.pad_ids_B))
    rows.num_alive.copy_((rows.reasons_B == FinishReason.NOT_FINISHED.value).sum())


def place_tokens(ends_B: Tensor, first: int, table_BM: Tensor, block_tokens: int) -> Places:
    positions_B = ends_B - first - 1
    is_padding_B = positions_B == 0
    blocks_B = table_BM.gather(1, (positions_B // block_tokens)[:, None]).squeeze(1)
    slots_B = blocks_B.long() * block_tokens + positions_B % block_tokens
    kv_lens_B = (positions_B + 1).int().masked_fill(is_padding_B, 0)
    return Places(positions_B, kv_lens_B, slots_B.masked_fill(is_padding_B, -1))
