"""The decoder layers of a pipeline stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

from torch import Tensor

from engine.cache import KVCache, LayerCache
from engine.comm import Group
from engine.kernels.api import Attending
from engine.kernels.cpu_blocks import BlockWeights, HeadShape, bind_blocks


class Layer(Protocol):
    """h [T, E] → h. `products` and `norms` are what it is made of, in the order of BlockWeights."""

    products: tuple[Callable[[Tensor], Tensor], ...]
    norms: tuple[Tensor, Tensor]

    def __call__(
        self,
        h_TE: Tensor,
        angles: tuple[Tensor, Tensor],
        layer: LayerCache,
        batch: Attending,
    ) -> Tensor: ...


class Stack:
    """h [T, E] → h, one layer after the other or, where that gives the same bits, all in one
    call."""

    def __init__(self, layers: Sequence[Layer], shape: HeadShape, eps: float, tp: Group):
        self._layers, self._shape, self._eps, self._tp = layers, shape, eps, tp

    def __call__(
        self, h_TE: Tensor, angles: tuple[Tensor, Tensor], cache: KVCache, batch: Attending
    ) -> Tensor:
        caches = [cache.layer(slot) for slot in range(len(self._layers))]
        if self._at_once is not None:
            end_TE = self._at_once(h_TE, angles, caches, batch)
            if end_TE is not None:
                return end_TE
        for layer, layer_cache in zip(self._layers, caches, strict=True):
            h_TE = layer(h_TE, angles, layer_cache, batch)
        return h_TE

    @cached_property
    def _at_once(self) -> Callable[..., Tensor | None] | None:
        # Ranks that share a layer add up their parts within it.
        if self._tp.size > 1:
            return None
        weights = [BlockWeights(layer.products, *layer.norms) for layer in self._layers]
        return bind_blocks(weights, self._shape, self._eps)
