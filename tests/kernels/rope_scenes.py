"""Ragged batches whose new tokens are not rotated and not cached yet, with the truth in fp64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.cache import LayerCache
from tests.kernels.helpers import Scene, make_scene, poisoned, random

# Largest code of a quantised cache.
LIMITS = {torch.int8: 127, torch.float8_e4m3fn: 448}


class RopeScene(NamedTuple):
    """Arguments of `rope_attention`, and the scene that it leaves for `attention`."""

    q_THD: Tensor
    k_TGD: Tensor
    v_TGD: Tensor
    cos_TC: Tensor
    sin_TC: Tensor
    layer: LayerCache
    rotated: Scene

    def arguments(self) -> tuple[Any, ...]:
        return (*self[:-1], self.rotated.batch)


def make_rope_scene(*args: Any, **options: Any) -> RopeScene:
    """As `make_scene`; the cache holds poison where this step's keys and values go."""
    scene = make_scene(*args, **options)
    (tokens, heads, dim), dtype = scene.q_THD.shape, scene.q_THD.dtype
    kv_heads, device = scene.layer.k.shape[1], scene.q_THD.device
    fused = random(tokens, heads + 2 * kv_heads, dim, dtype=dtype, seed=300)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    angles_TC = 6.3 * random(tokens, dim // 2, seed=301)
    cos_TC, sin_TC = angles_TC.cos(), angles_TC.sin()
    true_k, true_v = rotated(k, cos_TC, sin_TC), v.double()
    layer = scene.layer
    if layer.k_scale_G is not None:
        true_k = through_codes(true_k, layer.k_scale_G.cpu(), layer.k.dtype)
        true_v = through_codes(true_v, layer.v_scale_G.cpu(), layer.k.dtype)
    keys, values = _with_new(scene, true_k, true_v)
    empty(layer, scene.batch.slots_T)
    q_true = rotated(q, cos_TC, sin_TC)
    truth = scene._replace(q_THD=q_true, keys=keys, values=values)
    fused, cos_TC, sin_TC = (x.to(device) for x in (fused, cos_TC, sin_TC))
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    return RopeScene(q, k, v, cos_TC, sin_TC, layer, truth)


def rotated(x_THD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Channel i turned with channel i + D/2 in fp64, and rounded to the dtype of x."""
    low, high = x_THD.double().chunk(2, dim=-1)
    cos_T1C, sin_T1C = cos_TC.double()[:, None], sin_TC.double()[:, None]
    turned = (low * cos_T1C - high * sin_T1C, high * cos_T1C + low * sin_T1C)
    return torch.cat(turned, dim=-1).to(x_THD.dtype).double()


def through_codes(x_TGD: Tensor, scale_G: Tensor, codes: torch.dtype) -> Tensor:
    """What a cache of `codes` makes of x."""
    units = (x_TGD / scale_G.double()[:, None]).clamp(-LIMITS[codes], LIMITS[codes])
    kept = units.round() if codes == torch.int8 else units.float().to(codes).double()
    return kept * scale_G.double()[:, None]


def empty(layer: LayerCache, slots_T: Tensor) -> None:
    """Poison at the slots."""
    block_tokens = layer.k.shape[2]
    for slot in slots_T.tolist():
        for stored in layer[:2]:
            place = stored[slot // block_tokens, :, slot % block_tokens]
            place.copy_(poisoned(*place.shape, dtype=stored.dtype))


def _with_new(scene: Scene, true_k: Tensor, true_v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The scene's keys and values with those of this step's tokens last."""
    lens = scene.batch.query_lens
    both = []
    for old, new in ((scene.keys, true_k), (scene.values, true_v)):
        pairs = zip(old, new.split(lens), strict=True)
        both.append([torch.cat([x[: len(x) - len(y)].double(), y]) for x, y in pairs])
    return both[0], both[1]
