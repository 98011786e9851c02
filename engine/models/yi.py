"""The Yi network (Llama architecture) on a packed, ragged batch.

Dimensions (sizes are local to the rank):
  T tokens in flight   H query heads   G kv heads   D head size
  E model width        R rows whose logits are wanted   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Names
from typing import NamedTuple

import torch
from torch import Tensor

from engine.cache import KVCache, LayerCache
from engine.comm import Parallel
from engine.config import ModelConfig
from engine.kernels.api import Attending
from engine.layers.attention import Attention
from engine.layers.dense import Dense
from engine.layers.embedding import Embedding
from engine.layers.linear import Arrays, Norm, Projection, Use
from engine.layers.mlp import MLP
from engine.layers.rope import RotaryEmbedding
from engine.layers.stack import HeadShape, Stack
from engine.mapping import LocalShape, Mapping
from engine.quant import Algorithm, QuantConfig


class Step(NamedTuple):
    """One pass through the network: T tokens of several sequences, packed.

    `lengths_T` is the length of each token's sequence (dynamic RoPE scaling needs it);
    `output_rows` selects the rows whose logits are wanted (None: all).
    """

    tokens_T: Tensor
    positions_T: Tensor
    lengths_T: Tensor
    attending: Attending
    output_rows: Tensor | None


class Block:
    """One decoder layer: h [T, E] → h, the stream that both halves add to."""

    def __init__(self, arrays: Arrays, config: ModelConfig, shape: LocalShape, parallel: Parallel):
        eps = config.rms_norm_eps
        attn_norm = Norm(arrays.tensor("attn_norm.weight"), eps)
        mlp_norm = Norm(arrays.tensor("mlp_norm.weight"), eps)
        self._attn = Attention(arrays.at("attn"), attn_norm, shape, parallel.tp)
        self._mlp = MLP(arrays.at("mlp"), mlp_norm, parallel.tp)
        self.uses = (*self._attn.uses, *self._mlp.uses)
        self.products = tuple(use.product for use in self.uses)
        self.norms = (attn_norm.weight_E, mlp_norm.weight_E)

    def __call__(
        self,
        h_TE: Tensor,
        angles: tuple[Tensor, Tensor],
        layer: LayerCache,
        batch: Attending,
    ) -> Tensor:
        return self._mlp(self._attn(h_TE, angles, layer, batch))


class Head:
    """Final norm and output projection; every rank of the stage gets all logits."""

    def __init__(self, arrays: Arrays, config: ModelConfig, quant: QuantConfig, parallel: Parallel):
        self._norm = Norm(arrays.tensor("norm.weight"), config.rms_norm_eps)
        if quant.head is not Algorithm.NONE or "head.weight" in arrays:
            self._head = arrays.linear("head", quant.head)
        else:
            table_VE = _tied_head(arrays.tensor("embed.weight"), config, parallel)
            self._head = Projection(Dense({"weight": table_VE}))
        self._vocab, self._tp = config.vocab_size, parallel.tp
        self.use = Use(self._head.product, self._norm)

    def __call__(self, h_RE: Tensor) -> Tensor:
        logits_RV = self._tp.all_gather(self._head(h_RE, norm=self._norm))
        return logits_RV[:, : self._vocab]


class Yi:
    """The layers of one pipeline stage.

    Calling it returns logits [R, V] on the last stage, of the engine's dtype, and None on the
    others, which hand their hidden state on. `kv_scales` fp32 [layers, 2, G] belong to a cache
    that stores codes; None where it stores the engine's dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        quant: QuantConfig,
        mapping: Mapping,
        embedding_dim: int | None,
        tensors: Names[str, Tensor],
        parallel: Parallel,
    ):
        arrays = Arrays(tensors, quant.algorithm)
        shape = mapping.local(config)
        norm = arrays.tensor("blocks.0.attn_norm.weight")
        self.dtype, self.device = norm.dtype, norm.device
        self._width, self._parallel, self._mapping = config.hidden_size, parallel, mapping
        self._rotary = RotaryEmbedding(config, self.device)
        blocks = [arrays.at(f"blocks.{slot}") for slot, _ in mapping.layers(config)]
        self._blocks = [Block(block, config, shape, parallel) for block in blocks]
        heads = HeadShape(shape.heads, shape.kv_heads, shape.head_dim)
        self._stack = Stack(self._blocks, heads, config.rms_norm_eps, parallel.tp)
        self.kv_scales = _stack_kv_scales(blocks)
        if mapping.is_first_stage:
            self._embed = Embedding(arrays.tensor("embed.weight"), embedding_dim, parallel.tp)
        if mapping.is_last_stage:
            self._head = Head(arrays, config, quant, parallel)

    def uses(self) -> Iterator[Use]:
        """The linear layers' operations, with their weights."""
        for block in self._blocks:
            yield from block.uses
        if self._mapping.is_last_stage:
            yield self._head.use

    @torch.inference_mode()
    def __call__(self, step: Step, cache: KVCache) -> Tensor | None:
        if self._mapping.is_first_stage:
            h_TE = self._embed(step.tokens_T)
        else:
            h_TE = self._parallel.recv_prev((len(step.tokens_T), self._width), self.dtype)
        angles = self._rotary(step.positions_T, step.lengths_T)
        h_TE = self._stack(h_TE, angles, cache, step.attending)
        if not self._mapping.is_last_stage:
            self._parallel.send_next(h_TE)
            return None
        return self._head(h_TE if step.output_rows is None else h_TE[step.output_rows])


def _stack_kv_scales(blocks: Sequence[Arrays]) -> Tensor | None:
    attentions = [block.at("attn") for block in blocks]
    if "kv_scale" not in attentions[0]:
        return None
    return torch.stack([arrays.tensor("kv_scale") for arrays in attentions])


def _tied_head(table_VE: Tensor, config: ModelConfig, parallel: Parallel) -> Tensor:
    """This rank's rows of a table that serves as head too (see convert.shares_embedding)."""
    share = config.vocab_size // parallel.tp.size
    if table_VE.shape[0] == share:
        return table_VE
    return table_VE[parallel.tp.rank * share : (parallel.tp.rank + 1) * share]
