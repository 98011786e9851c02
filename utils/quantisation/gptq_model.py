"""GPTQ of a whole model with one decoder layer in memory at a time.

Each layer reads what the layers before it give once they are rounded, and inside a layer each
matrix what the matrices before it give: q, k and v, then o, then gate and up, then down.
"""

# Dimensions: B texts of a batch, S positions, E model width, F MLP width, H·D heads by head size.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRotaryEmbedding,
)

from engine.checkpoint.base import EMBEDDING, FINAL_NORM, HEAD, Checkpoint, canonical_shapes
from engine.checkpoint.linear_layers import is_linear
from engine.errors import CheckpointError
from utils.quantisation.gptq import Hessian, Rounded, round_matrix
from utils.quantisation.gptq_file import pack_linear
from utils.quantisation.hf_model import llama_config, load_layer

# cos and sin [1, S, D].
Rotary = tuple[Tensor, Tensor]


class LayerRounder:
    """Rounds the matrices of one decoder layer in place and keeps their codes on the CPU."""

    def __init__(self, layer: LlamaDecoderLayer, rotaries: Sequence[Rotary], group_size: int):
        self._layer, self._rotaries, self._group_size = layer, rotaries, group_size
        self.rounded: dict[str, Rounded] = {}

    @torch.inference_mode()
    def run(self, batches: list[Tensor]) -> list[Tensor]:
        """Round everything for the layer inputs [B, S, E] and return its outputs for them."""
        attention, mlp = self._layer.self_attn, self._layer.mlp
        before, after = self._layer.input_layernorm, self._layer.post_attention_layernorm
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self._round(names, map(before, batches))
        merged = [
            attend(attention, before(x_BSE), rotary)
            for x_BSE, rotary in zip(batches, self._rotaries, strict=True)
        ]
        self._round(("self_attn.o_proj",), merged)
        batches = [
            x_BSE + attention.o_proj(heads) for x_BSE, heads in zip(batches, merged, strict=True)
        ]
        self._round(("mlp.gate_proj", "mlp.up_proj"), map(after, batches))
        self._round(("mlp.down_proj",), (gated(mlp, after(x_BSE)) for x_BSE in batches))
        return [x_BSE + mlp(after(x_BSE)) for x_BSE in batches]

    def _round(self, names: Sequence[str], inputs: Iterable[Tensor]) -> None:
        """Round the matrices that read `inputs`."""
        linears = {name: self._layer.get_submodule(name) for name in names}
        first = next(iter(linears.values()))
        hessian = Hessian(first.in_features, first.weight.device)
        for x in inputs:
            hessian.add(x)
        for name, linear in linears.items():
            rounded = round_matrix(linear.weight, hessian.sum_KK, self._group_size)
            linear.weight.data = rounded.weight_NK.to(linear.weight.dtype)
            self.rounded[name] = rounded.cpu()


def attend(attention: LlamaAttention, x_BSE: Tensor, rotary: Rotary) -> Tensor:
    """What o_proj reads, [B, S, H·D]: attention without its last matrix."""
    o_proj, attention.o_proj = attention.o_proj, nn.Identity()
    try:
        # No mask: the sequences of a batch are equally long, and attention is causal by itself.
        return attention(x_BSE, position_embeddings=rotary, attention_mask=None)[0]
    finally:
        attention.o_proj = o_proj


def gated(mlp: LlamaMLP, x_BSE: Tensor) -> Tensor:
    """What down_proj reads, [B, S, F]."""
    return mlp.act_fn(mlp.gate_proj(x_BSE)) * mlp.up_proj(x_BSE)


@torch.inference_mode()
def round_layers(
    checkpoint: Checkpoint,
    batches: Sequence[Tensor],
    *,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[dict[str, Rounded]]:
    """The rounded matrices of each decoder layer by their names in it, for token ids [B, S].

    UserError for a calibration that gave numbers that are not finite.
    """
    config = llama_config(checkpoint)
    table_VE = checkpoint.tensors[EMBEDDING].read()
    hidden = [table_VE[tokens_BS].to(device=device, dtype=dtype) for tokens_BS in batches]
    del table_VE
    rotary = LlamaRotaryEmbedding(config).to(device)
    rotaries = [
        rotary(x_BSE, torch.arange(x_BSE.shape[1], device=device).unsqueeze(0)) for x_BSE in hidden
    ]
    for index in range(checkpoint.config.num_layers):
        rounder = LayerRounder(
            load_layer(checkpoint, config, index, dtype, device), rotaries, group_size
        )
        hidden, rounded = rounder.run(hidden), rounder.rounded
        # The next layer is read into the memory of this one.
        del rounder
        yield rounded


def make_tensors(
    checkpoint: Checkpoint, layers: Iterable[dict[str, Rounded]], group_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Name and contents of the file's tensors, in the order of `plan_tensors`."""
    config = checkpoint.config
    names = [name for name in canonical_shapes(config) if name.startswith("model.layers.")]
    yield EMBEDDING, read_half(checkpoint, EMBEDDING)
    for index, rounded in enumerate(layers):
        prefix = f"model.layers.{index}."
        for name in (name for name in names if name.startswith(prefix)):
            if not is_linear(name):
                yield name, read_half(checkpoint, name)
                continue
            stem = name.removesuffix(".weight")
            packed = pack_linear(rounded[stem.removeprefix(prefix)], group_size)
            yield from ((f"{stem}.{suffix}", tensor) for suffix, tensor in packed.items())
    yield FINAL_NORM, read_half(checkpoint, FINAL_NORM)
    if not config.tie_word_embeddings:
        yield HEAD, read_half(checkpoint, HEAD)


def read_half(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor as fp16, which the format asks for; CheckpointError if it does not fit."""
    half = checkpoint.tensors[name].read().half()
    if not torch.isfinite(half).all():
        raise CheckpointError(
            f"{checkpoint.where}: tensor {name} holds values that float16 cannot, and a GPTQ file "
            "stores float16; choose another --qformat"
        )
    return half
